"""A causal adapter that answers aloud: token by token, greedily or drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from transformers import TextStreamer

from common.config import TaskKind
from common.errors import ModelError
from common.models import AdaptedModel
from common.prediction import Predictor
from common.tables import Table


class _To(TextStreamer):  # type: ignore[misc]
    """Writes finished words to `out`, and remembers them."""

    def __init__(self, tokenizer: Any, out: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._out = out
        self.said = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.said += text
        self._out.write(text + ("\n" if stream_end else ""))
        self._out.flush()


@dataclass
class Speaker:
    """`temperature` 0 is greedy. With `chat` the conversation so far is part of each prompt."""

    predictor: Predictor
    options: dict[str, Any]
    chat: bool
    turns: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        predictor: Predictor,
        longest: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        chat: bool,
    ) -> Speaker:
        """
        Raises:
            ModelError: the adapter is of no causal model, or `chat` and the model has no template.
        """
        model = predictor.model
        if predictor.kind is not TaskKind.CAUSAL_LM:
            raise ModelError(f"confide ask needs a causal-lm adapter, this one is of {predictor.kind.value}")
        if chat and not model.tokenizer.chat_template:
            raise ModelError("the model's tokenizer has no chat template: leave --chat out")
        if seed is not None:
            torch.manual_seed(seed)
        options: dict[str, Any] = {"max_new_tokens": longest, "num_beams": 1, "pad_token_id": model.pad_id}
        if temperature > 0:
            options |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        else:
            options |= {"do_sample": False}
        return cls(predictor, options, chat)

    @torch.no_grad()
    def answer(self, question: str, out: TextIO) -> str:
        """Write the answer to `out` as it comes; all of it."""
        model: AdaptedModel = self.predictor.model
        ids = torch.tensor([self._ids(question)], device=model.device)
        streamer = _To(model.tokenizer, out)
        peft: Any = model.peft
        peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **self.options)
        if self.chat:
            self.turns.append({"role": "assistant", "content": streamer.said.strip()})
        return streamer.said

    def _ids(self, question: str) -> list[int]:
        model = self.predictor.model
        if self.chat:
            self.turns.append({"role": "user", "content": question})
            made = model.tokenizer.apply_chat_template(
                self.turns, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            return list(made["input_ids"])
        # As prompts were read in training.
        table = Table("question", ("",), None, (question,), None, (1,))
        examples = model.task.encode(table, model.tokenizer, self.predictor.max_length)
        return [int(t) for t in examples.tokens[: int(examples.targets([0])[0])]]
