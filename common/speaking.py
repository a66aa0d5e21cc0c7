"""A causal adapter that answers aloud: token by token, greedily or drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from common.chat_template import chat_ids
from common.config import TaskKind
from common.errors import ModelError
from common.models import AdaptedModel
from common.prediction import Predictor
from common.tables import Table
from common.turns import Turn, lone, tidied


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

    def __init__(self, tokenizer: Any, ends: frozenset[int], tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends = ends
        self._tell = tell
        self.said = ""

    def put(self, value: torch.Tensor) -> None:
        """An end may be no special token, and is no word."""
        if self.next_tokens_are_prompt or int(value.flatten()[-1]) not in self._ends:
            super().put(value)

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
    teller = _Teller(model.tokenizer, model.ends, tell)
    peft: Any = model.peft
    written = peft.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        streamer=teller,
        stopping_criteria=StoppingCriteriaList([_Stop(stopped)]),
        **options,
    )[0, len(ids) :].tolist()
    return Said(teller.said, len(written), bool(written) and written[-1] in model.ends)


def room_after(model: AdaptedModel, ids: Sequence[int]) -> int | None:
    """How many tokens the model can write after `ids`; None: it knows no limit.

    Raises:
        ModelError: none.
    """
    base: Any = model.base
    most = getattr(base.config, "max_position_embeddings", None)
    if most is not None and len(ids) >= most:
        raise ModelError(
            f"the prompt has {len(ids)} tokens, the model reads at most {most} with its answer: ask less, or "
            "begin a new conversation"
        )
    return None if most is None else int(most) - len(ids)


def question_ids(predictor: Predictor, question: str, system: str = "") -> list[int]:
    """A question that stands alone, as prompts were read in training; after `system`, if any."""
    model = predictor.model
    asked = lone(question, system) if predictor.section.chat else question
    table = Table("question", ("",), None, (asked,), None, (1,))
    examples = model.task.encode(table, model.tokenizer, predictor.max_length)
    return [int(t) for t in examples.tokens[: int(examples.target[0][0])]]


@dataclass
class Speaker:
    """With `chat` the conversation so far is part of each prompt. `system`: a turn before it; "": none."""

    predictor: Predictor
    draw: Draw
    chat: bool
    system: str = ""
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
        system: str = "",
    ) -> Speaker:
        """
        Raises:
            ModelError: the adapter is of no causal model; or `chat`, and the model has no template; or
                `system`, and the adapter reads no conversations.
        """
        if predictor.kind is not TaskKind.CAUSAL_LM:
            raise ModelError(f"confide ask needs a causal-lm adapter, this one is of {predictor.kind.value}")
        if chat and not predictor.model.tokenizer.chat_template:
            raise ModelError("the model's tokenizer has no chat template: leave --chat out")
        if system and not (chat or predictor.section.chat):
            raise ModelError("the adapter reads texts, no conversations: leave --system out, or add --chat")
        if seed is not None:
            torch.manual_seed(seed)
        return cls(predictor, Draw(longest, temperature, top_p), chat, tidied(system))

    def answer(self, question: str, out: TextIO) -> str:
        """Write the answer to `out` as it comes; all of it.

        Raises:
            ModelError: the model cannot read the question, or the conversation so far.
        """

        def tell(text: str) -> None:
            out.write(text)
            out.flush()

        model, ids = self.predictor.model, self._ids(question)
        room = room_after(model, ids)
        longest = self.draw.longest if room is None else min(room, self.draw.longest)
        said = speak(model, ids, replace(self.draw, longest=longest), tell)
        tell("\n")
        if self.chat:
            self.turns += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": said.text.strip()},
            ]
        return said.text

    def _ids(self, question: str) -> list[int]:
        if not self.chat:
            return question_ids(self.predictor, question, self.system)
        before = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": question}
        return chat_ids(self.predictor.model.tokenizer, [*before, *self.turns, asked])
