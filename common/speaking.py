"""A causal adapter that answers aloud: token by token, greedily or drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from common.config import TaskKind
from common.errors import ModelError
from common.models import AdaptedModel
from common.prediction import Predictor
from common.tables import Table
from common.turns import Turn, chat_ids, user_turn


@dataclass(frozen=True)
class Draw:
    """How an answer is drawn: at most `longest` tokens; `temperature` 0 is greedy. `seed` None: go on from
    where torch is."""

    longest: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Said:
    """`tokens`: written, the end token included. `ended`: by itself, not cut at `longest` or stopped."""

    text: str
    tokens: int
    ended: bool


class _Teller(TextStreamer):  # type: ignore[misc]
    """Tells finished words as they come, and remembers them."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell
        self.said = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.said += text
        if text:
            self._tell(text)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stopped(), device=input_ids.device)


@torch.no_grad()
def speak(
    model: AdaptedModel,
    ids: Sequence[int],
    draw: Draw,
    tell: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Said:
    """Continue `ids`. `tell` hears the text as it comes; after each token `stopped` may end it."""
    if draw.seed is not None:
        torch.manual_seed(draw.seed)
    options: dict[str, Any] = {"max_new_tokens": draw.longest, "num_beams": 1, "pad_token_id": model.pad_id}
    if draw.temperature > 0:
        options |= {"do_sample": True, "temperature": draw.temperature, "top_p": draw.top_p, "top_k": 0}
    else:
        options |= {"do_sample": False}
    given = torch.tensor([list(ids)], device=model.device)
    teller = _Teller(model.tokenizer, tell)
    peft: Any = model.peft
    written = peft.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        streamer=teller,
        stopping_criteria=StoppingCriteriaList([_Stop(stopped)]),
        **options,
    )[0, len(ids) :].tolist()
    base: Any = model.base
    ends = base.generation_config.eos_token_id or ()  # a list, of every causal model that we load
    return Said(teller.said, len(written), bool(written) and written[-1] in ends)


def question_ids(predictor: Predictor, question: str) -> list[int]:
    """A question that stands alone, as prompts were read in training."""
    model = predictor.model
    asked = user_turn(question) if predictor.section.chat else question
    table = Table("question", ("",), None, (asked,), None, (1,))
    examples = model.task.encode(table, model.tokenizer, predictor.max_length)
    return [int(t) for t in examples.tokens[: int(examples.target[0][0])]]


@dataclass
class Speaker:
    """With `chat` the conversation so far is part of each prompt."""

    predictor: Predictor
    draw: Draw
    chat: bool
    turns: list[Turn] = field(default_factory=list)

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
        if predictor.kind is not TaskKind.CAUSAL_LM:
            raise ModelError(f"confide ask needs a causal-lm adapter, this one is of {predictor.kind.value}")
        if chat and not predictor.model.tokenizer.chat_template:
            raise ModelError("the model's tokenizer has no chat template: leave --chat out")
        if seed is not None:
            torch.manual_seed(seed)
        return cls(predictor, Draw(longest, temperature, top_p), chat)

    def answer(self, question: str, out: TextIO) -> str:
        """Write the answer to `out` as it comes; all of it."""

        def tell(text: str) -> None:
            out.write(text)
            out.flush()

        said = speak(self.predictor.model, self._ids(question), self.draw, tell)
        tell("\n")
        if self.chat:
            self.turns.append({"role": "assistant", "content": said.text.strip()})
        return said.text

    def _ids(self, question: str) -> list[int]:
        if not self.chat:
            return question_ids(self.predictor, question)
        self.turns.append({"role": "user", "content": question})
        return chat_ids(self.predictor.model.tokenizer, self.turns)
