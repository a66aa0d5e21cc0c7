"""Conversations, whole or up to an answer, and their tokens as a model's chat template writes them.

Turns are what OpenAI's clients call messages: objects with `role` and `content`. First a system turn, where
there is one; then the user and the assistant by turns, the user first and last, since the assistant's is the
answer. A whole dialogue goes on after the first answer; what the user says after the last one is not read.

In a table a conversation is one string, as every value is: of equal conversations the same one, and a lone
turn of the user is its content, as a lone answer is. Two control characters keep turns apart; they are taken
out of contents.
"""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from common.cells import Cell, type_name, value_of
from common.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, str]
TRAINING_DAY = datetime(2026, 1, 1)  # for templates that write the date: one for all sites, at every resume

_TODAY = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")
_TURN, _SAID = "\x02", "\x03"
_USER, _ASSISTANT, _SYSTEM = "user", "assistant", "system"
_CURE = "Make records of one answer each, with data.prompt, or choose another model"
_WANTED = "a system turn or none, then turns of user and assistant, the user first"


def prompt_of(value: object, cell: Cell) -> str:
    """A conversation from a cell: the user's one turn, or a list of turns, or the JSON of one.

    Raises:
        DataError: a list is no conversation. No content is shown.
    """
    turns = turns_in(value)
    if turns is None:
        return content_of(value, cell)
    kept = _checked(turns, cell)
    if kept[-1][0] != _USER:
        raise cell.fault(f"{_WANTED} and last (whole dialogues have no data.prompt)", _described(kept))
    return _marked(kept) if len(kept) > 1 else kept[0][1]


def dialogue_of(value: object, cell: Cell) -> str:
    """A whole dialogue from a cell: a list of turns, or the JSON of one. Without turns, or of blanks, it is
    empty. What the user says after the last answer may have any form; what is none is left out.

    Raises:
        DataError: it is none, or nobody answers in it. No content is shown.
    """
    turns = turns_in(value)
    if turns == [] or (isinstance(value, str) and user_turn(value).strip() in ("", "[]")):
        return ""
    if turns is None:
        found = "text" if isinstance(value, str) else type_name(value)
        raise cell.fault("a dialogue, a list of turns with role and content, or its JSON", found)
    end = len(turns)
    while end and isinstance(turns[end - 1], dict) and turns[end - 1].get("role") == _USER:
        end -= 1
    if not end:
        raise cell.fault("a dialogue with an answer in it", "none")
    kept = _checked(turns[:end], cell)
    if kept[-1][0] != _ASSISTANT:
        raise cell.fault("a dialogue with an answer in it", "none")
    for turn in turns[end:]:
        with contextlib.suppress(DataError):
            kept.append((_USER, content_of(turn.get("content"), cell)))
    return _marked([(role, content) for role, content in kept if content])


def halves(dialogue: str) -> tuple[str, str]:
    """What stands before the first answer of what `dialogue_of` made, as `prompt_of` has it; and the rest, to
    the last answer."""
    if not dialogue:
        return "", ""
    turns = [(turn["role"], turn["content"]) for turn in conversation(dialogue)]
    spoken = [place for place, (role, _) in enumerate(turns) if role == _ASSISTANT]
    first, last = spoken[0], spoken[-1]
    before = _marked(turns[:first]) if first > 1 else turns[0][1]
    return before, turns[first][1] + _marked(turns[first + 1 : last + 1])


def _checked(turns: Sequence[object], cell: Cell) -> list[tuple[str, str]]:
    """(role, content) of each turn, at least one, of user and assistant by turns."""
    kept: list[tuple[str, str]] = []
    for number, turn in enumerate(turns, start=1):
        given = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
        if set(given) != {"role", "content"}:
            raise cell.fault("turns with role and content, and nothing else", f"another turn {number}")
        content = content_of(given["content"], cell)
        if not content:
            raise cell.fault("turns in which something is said", f"an empty turn {number}")
        kept.append((given["role"], content))
    roles = [role if role in (_USER, _ASSISTANT, _SYSTEM) else "another" for role, _ in kept]
    said = roles[1:] if roles[:1] == [_SYSTEM] else roles
    if not said or said != [(_USER, _ASSISTANT)[i % 2] for i in range(len(said))]:
        raise cell.fault(_WANTED, _described(kept))
    return kept


def _described(turns: Sequence[tuple[str, str]]) -> str:
    roles = [role if role in (_USER, _ASSISTANT, _SYSTEM) else "another" for role, _ in turns]
    return f"{len(roles)} turns of {', '.join(roles[:10])}" if roles else "no turn"


def _marked(turns: Sequence[tuple[str, str]]) -> str:
    return "".join(f"{_TURN}{role}{_SAID}{content}" for role, content in turns)


def user_turn(text: str) -> str:
    """`text` as a lone turn, whatever it looks like."""
    return text.replace(_TURN, "").replace(_SAID, "")


def content_of(content: object, cell: Cell) -> str:
    """What is said in a turn, as it is trained on: text, or OpenAI's list of parts that are text."""
    match content:
        case [*parts] if parts and all(isinstance(p, dict) and p.get("type") == "text" for p in parts):
            return _tidied("".join(value_of(part.get("text"), cell) for part in parts))
        case _:
            return _tidied(value_of(content, cell))


def _tidied(content: str) -> str:
    return unicodedata.normalize("NFC", user_turn(content)).strip()


def turns_in(value: object) -> list[Any] | None:
    """The list that a cell holds, or the JSON of a list of turns; `None` where it is text."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        found = json.loads(user_turn(value))
    except (ValueError, RecursionError):
        return None
    meant = isinstance(found, list) and found and all(isinstance(t, dict) and "role" in t for t in found)
    return found if meant else None


def conversation(prompt: str) -> list[Turn]:
    """The turns of what `prompt_of` or `dialogue_of` made."""
    first, *marked = prompt.split(_TURN)
    lone = [] if prompt.startswith(_TURN) else [{"role": _USER, "content": first}]
    return lone + [dict(zip(("role", "content"), turn.split(_SAID, 1), strict=True)) for turn in marked]


def answers(text: str) -> list[Turn]:
    """The turns from the first answer on: of the second half of a dialogue, or of a lone answer."""
    first, _, rest = text.partition(_TURN)
    return [{"role": _ASSISTANT, "content": first}, *(conversation(_TURN + rest) if rest else ())]


@dataclass(frozen=True)
class AnswerForm:
    """How a chat template writes answers. `end`: the token that ends one. `fault`: why those of the past
    cannot be trained on; None: they can."""

    end: int | None
    fault: str | None


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
        if turns and turns[0]["role"] == _SYSTEM:
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
        [{**turn, "content": _tidied(turn["content"])} for turn in turns],
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
            chat_ids(
                tokenizer,
                [*opening, {"role": _ASSISTANT, "content": answer}, {"role": _USER, "content": "2"}],
                TRAINING_DAY,
            )
            for answer in ("0", "1")
        )
    except ModelError:
        return AnswerForm(text_end, "takes no second question")
    first, rest = _alike(said, other), _alike(said[::-1], other[::-1])
    if first == len(said):
        return AnswerForm(text_end, "cannot be followed: the tokenizer knows too few words")
    end = _first_added(tokenizer, said[len(said) - rest :])
    if end is None:
        return AnswerForm(text_end, "writes no special token where an answer ends")
    if said[: len(asked)] == asked and tokenizer.decode(said[len(asked) : first]).strip():
        return AnswerForm(end, "begins answers of the past otherwise than it asks for a new one")
    return AnswerForm(end, None)


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[Turn]:
    """A conversation that the template takes: a question, after a system turn where it wants one."""
    if not tokenizer.chat_template:
        raise ModelError(
            "task.chat: the model's tokenizer has no chat template. Choose a model that was tuned on "
            "conversations, or set task.chat to false"
        )
    question: Turn = {"role": _USER, "content": "2"}
    why = ""
    for turns in ([question], [{"role": _SYSTEM, "content": "2"}, question]):
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


def _first_added(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int | None:
    """The first of the tokens that were added to the words, if nothing but blanks stands before it."""
    begins = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}
    place = next((i for i, token in enumerate(ids) if token in added), None)
    if place is None or ids[place] in begins or tokenizer.decode(ids[:place]).strip():
        return None
    return ids[place]


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
    """The tokens of a dialogue up to where its last answer begins; and places in them, of each answer in
    `text` but the last its beginning and its end, of the last where it will begin. Beyond the first `most`
    tokens after the prompt, places are left out. `form`: of the tokenizer (`answer_form`).

    Raises:
        ModelError: the template does not take it, or cannot be used for whole dialogues.
    """
    before = conversation(prompt)
    turns = [*before, *answers(text)]
    ids = chat_ids(tokenizer, before, today)
    if form.fault and len(turns) > len(before) + 1:
        raise ModelError(f"the model's chat template {form.fault}. {_CURE}")
    places = [len(ids)]
    for asked in range(len(before) + 2, len(turns), 2):  # the answer before stands at asked - 2
        long = len(ids) >= places[0] + most
        read = chat_ids(tokenizer, turns[:-1] if long else turns[:asked], today)
        if read[: len(ids)] != ids:
            raise ModelError(f"the model's chat template writes the past anew with each turn. {_CURE}")
        if long:
            return read, places
        end = next((i for i in range(len(ids), len(read)) if read[i] == form.end), None)
        if end is None:
            raise ModelError(f"the model's chat template ends some answers otherwise than others. {_CURE}")
        places += [end + 1, len(read)]
        ids = read
    return ids, places


@cache
def _on_day(template: str, day: datetime) -> str:
    """The template with `day` for today. transformers lets nobody pass a clock of their own to it."""
    dated = _TODAY.sub(lambda call: json.dumps(day.strftime(call[2])), template)
    if "strftime_now(" in dated:
        raise ValueError("it writes a date that depends on more than the day")
    return dated
