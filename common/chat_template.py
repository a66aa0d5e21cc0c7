"""Conversations as tokens: what a model's chat template writes, and where in it the answers are."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING

from common.errors import ModelError
from common.turns import ASSISTANT, SYSTEM, USER, Turn, answers, conversation, tidied

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINING_DAY = datetime(2026, 1, 1)  # for templates that write the date: one for all sites, at every resume

_TODAY = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")
_NEXT: Turn = {"role": USER, "content": "2"}  # what is said after an answer, so that its end is written
_ANEW = "writes the past anew with each turn"
_CURE = "Make records of one answer each, with data.prompt, or choose another model"


@dataclass(frozen=True)
class AnswerForm:
    """How a chat template writes answers. `end`: the token that ends one. `fault`: why those of the past
    cannot be trained on; None: they can. `after`: tokens from an end to where `_NEXT` wants an answer."""

    end: int | None
    fault: str | None
    after: int = 0


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], today: datetime | None = None
) -> list[int]:
    """The tokens of a conversation by the chat template, up to where the answer begins.

    A control token in a turn's content is read as text: nobody writes other turns than his own.
    `today`: the day that a template may write; `None`: this one.

    Raises:
        ModelError: the template does not take this conversation. No content is shown.
    """
    try:
        return _written(tokenizer, turns, today)
    except Exception as error:  # a template may raise anything, with the conversation in its message
        says = f"the model's chat template does not take this conversation ({type(error).__name__})"
        if turns and turns[0]["role"] == SYSTEM:
            says += ". Not every model takes a system turn: put it into the user's first"
        elif len(turns) > 1:
            says += ". Not every model takes several questions, or turns in this order"
        else:
            says += ". Does the model want a system turn?"
        raise ModelError(says) from None


def _written(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], today: datetime | None = None
) -> list[int]:
    template = tokenizer.get_chat_template()
    made = tokenizer.apply_chat_template(
        [{**turn, "content": tidied(turn["content"])} for turn in turns],
        chat_template=template if today is None else _on_day(template, today),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        sanitize_control_tokens=True,
    )
    return list(made["input_ids"])


def answer_form(tokenizer: PreTrainedTokenizerBase) -> AnswerForm:
    """How the chat template writes an answer, by what it makes of a conversation that we make up.

    An answer ends with the first of the tokenizer's added tokens that stands after it, since a model tuned on
    conversations may have an end of its own; where there is none, with the tokenizer's end token.

    Raises:
        ModelError: there is no template, or it takes no conversation.
    """
    text_end: int | None = tokenizer.eos_token_id
    opening = _opening(tokenizer)
    asked = chat_ids(tokenizer, opening, TRAINING_DAY)
    try:
        said, other = (
            chat_ids(tokenizer, [*opening, {"role": ASSISTANT, "content": answer}, _NEXT], TRAINING_DAY)
            for answer in ("0", "1")
        )
    except ModelError:
        return AnswerForm(text_end, "takes no second question")
    first, rest = _alike(said, other), _alike(said[::-1], other[::-1])
    if first == len(said):
        return AnswerForm(text_end, "cannot be followed: the tokenizer knows too few words")
    end = _first_added(tokenizer, said, len(said) - rest)
    if end is None:
        return AnswerForm(text_end, "writes no special token where an answer ends")
    if said[: len(asked)] != asked:
        return AnswerForm(said[end], _ANEW)
    if tokenizer.decode(said[len(asked) : first]).strip():
        return AnswerForm(said[end], "begins answers of the past otherwise than it asks for a new one")
    return AnswerForm(said[end], None, len(said) - end - 1)


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[Turn]:
    """A conversation that the template takes: a question, after a system turn where it wants one."""
    if not tokenizer.chat_template:
        raise ModelError(
            "task.chat: the model's tokenizer has no chat template. Choose a model that was tuned on "
            "conversations, or set task.chat to false"
        )
    why = ""
    for turns in ([_NEXT], [{"role": SYSTEM, "content": "2"}, _NEXT]):
        try:
            _written(tokenizer, turns, TRAINING_DAY)
        except Exception as error:  # it may raise anything; the conversation in its message is ours
            why = why or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            return turns
    raise ModelError(
        f"the model's chat template takes no conversation, not even one question ({why}). Choose another "
        "model, or mend its chat template"
    )


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _first_added(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], begin: int) -> int | None:
    """Where the first token from `begin` stands that was added to the words, if blanks alone stand before."""
    begins = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}
    place = next((i for i in range(begin, len(ids)) if ids[i] in added), None)
    if place is None or ids[place] in begins or tokenizer.decode(ids[begin:place]).strip():
        return None
    return place


def end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer (`answer_form`), or a text where there is no usable chat template."""
    if tokenizer.chat_template:
        with contextlib.suppress(ModelError):  # it is told to who trains on conversations
            return answer_form(tokenizer).end
    end: int | None = tokenizer.eos_token_id
    return end


def dialogue_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, form: AnswerForm, today: datetime, most: int
) -> tuple[list[int], list[int]]:
    """The tokens of a dialogue to the end of its last answer; and places in them, where each answer in `text`
    begins and where the next turn does. Beyond the first `most` tokens after the prompt, places are left out.
    `form`: of the tokenizer (`answer_form`).

    A lone answer that the template cannot end is written as it is, and the end token after it.

    Raises:
        ModelError: the template does not take it, or cannot be used for whole dialogues.
    """
    before, said = conversation(prompt), answers(text)
    asked = chat_ids(tokenizer, before, today)
    try:
        if form.fault:
            raise ModelError(f"the model's chat template {form.fault}")
        return _followed(tokenizer, before, said, asked, form, today, most)
    except ModelError as error:
        if len(said) > 1:
            raise ModelError(f"{error}. {_CURE}") from None
        answer = tokenizer(said[0]["content"], add_special_tokens=False, split_special_tokens=True)
        end = () if form.end is None else (form.end,)
        return [*asked, *answer["input_ids"], *end], [len(asked)]


def _followed(
    tokenizer: PreTrainedTokenizerBase,
    before: Sequence[Turn],
    said: Sequence[Turn],
    ids: list[int],
    form: AnswerForm,
    today: datetime,
    most: int,
) -> tuple[list[int], list[int]]:
    """As `dialogue_ids`, answer by answer. `ids`: of `before`."""
    places = [len(ids)]
    answered = 1  # so many of `said` are written, the last of them an answer
    while True:
        long = len(ids) >= places[0] + most
        written = said if long else said[:answered]
        following = _NEXT if len(written) == len(said) else said[answered]
        read = chat_ids(tokenizer, [*before, *written, following], today)
        if read[: len(ids)] != ids:
            raise ModelError(f"the model's chat template {_ANEW}")
        if long:
            return read[: len(read) - form.after], places
        end = next((i for i in range(len(ids), len(read)) if read[i] == form.end), None)
        if end is None:
            raise ModelError("the model's chat template ends some answers otherwise than others")
        if answered == len(said):
            return read[: end + 1], places
        places += [end + 1, len(read)]
        ids, answered = read, answered + 2


@cache
def _on_day(template: str, day: datetime) -> str:
    """The template with `day` for today. transformers lets nobody pass a clock of their own to it."""
    dated = _TODAY.sub(lambda call: json.dumps(day.strftime(call[2])), template)
    if "strftime_now(" in dated:
        raise ValueError("it writes a date that depends on more than the day")
    return dated
