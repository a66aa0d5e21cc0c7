"""Conversations, whole or up to an answer, as tables hold them.

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
from typing import Any

from common.cells import Cell, type_name, value_of
from common.errors import DataError

Turn = dict[str, str]
_TURN, _SAID = "\x02", "\x03"
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
_BEGINS = re.compile(r"\s*\[\s*\{")
_WANTED = "a system turn or none, then turns of user and assistant, the user first"


def prompt_of(value: object, cell: Cell) -> str:
    """A conversation from a cell: the user's one turn, or a list of turns, or the JSON of one.

    Raises:
        DataError: a list is no conversation. No content is shown.
    """
    turns = turns_in(value)
    if turns is None and looks_like_turns(value):
        raise cell.fault(
            "the JSON of a list of turns with role and content, or text",
            "text that begins like a list and is none",
            "Write it with json.dumps; text that begins so goes into a turn of its own.",
        )
    if turns is None:
        return content_of(value, cell)
    kept = _checked(turns, cell)
    if kept[-1][0] != USER:
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
    while end and isinstance(turns[end - 1], dict) and turns[end - 1].get("role") == USER:
        end -= 1
    if not end:
        raise cell.fault("a dialogue with an answer in it", "none")
    kept = _checked(turns[:end], cell)
    if kept[-1][0] != ASSISTANT:
        raise cell.fault("a dialogue with an answer in it", "none")
    for turn in turns[end:]:
        with contextlib.suppress(DataError):
            kept.append((USER, content_of(turn.get("content"), cell)))
    return _marked([(role, content) for role, content in kept if content])


def halves(dialogue: str) -> tuple[str, str]:
    """What stands before the first answer of what `dialogue_of` made, as `prompt_of` has it; and the rest, to
    the last answer."""
    if not dialogue:
        return "", ""
    turns = [(turn["role"], turn["content"]) for turn in conversation(dialogue)]
    spoken = [place for place, (role, _) in enumerate(turns) if role == ASSISTANT]
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
    roles = [role if role in (USER, ASSISTANT, SYSTEM) else "another" for role, _ in kept]
    said = roles[1:] if roles[:1] == [SYSTEM] else roles
    if not said or said != [(USER, ASSISTANT)[i % 2] for i in range(len(said))]:
        raise cell.fault(_WANTED, _described(kept))
    return kept


def _described(turns: Sequence[tuple[str, str]]) -> str:
    roles = [role if role in (USER, ASSISTANT, SYSTEM) else "another" for role, _ in turns]
    return f"{len(roles)} turns of {', '.join(roles[:10])}" if roles else "no turn"


def _marked(turns: Sequence[tuple[str, str]]) -> str:
    return "".join(f"{_TURN}{role}{_SAID}{content}" for role, content in turns)


def user_turn(text: str) -> str:
    """`text` as a lone turn, whatever it looks like."""
    return text.replace(_TURN, "").replace(_SAID, "")


def lone(question: str, system: str = "") -> str:
    """A question that stands alone, whatever it looks like, as `prompt_of` has it; after `system`, if any."""
    asked, before = tidied(question), tidied(system)
    return _marked([(SYSTEM, before), (USER, asked)]) if before else asked


def content_of(content: object, cell: Cell) -> str:
    """What is said in a turn, as it is trained on: text, or OpenAI's list of parts that are text."""
    if isinstance(content, list) and content:
        texts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
        if len(texts) == len(content):
            return tidied("".join(value_of(text, cell) for text in texts))
    return tidied(value_of(content, cell))


def tidied(content: str) -> str:
    """The content of a turn as it is written, wherever it comes from."""
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


def looks_like_turns(value: object) -> bool:
    """Whether a cell was meant to hold turns: a list, or text that begins like one, cut short or written as
    Python does it."""
    return isinstance(value, list) or (isinstance(value, str) and bool(_BEGINS.match(value)))


def conversation(prompt: str) -> list[Turn]:
    """The turns of what `prompt_of` or `dialogue_of` made."""
    first, *marked = prompt.split(_TURN)
    lone = [] if prompt.startswith(_TURN) else [{"role": USER, "content": first}]
    return lone + [dict(zip(("role", "content"), turn.split(_SAID, 1), strict=True)) for turn in marked]


def answers(text: str) -> list[Turn]:
    """The turns from the first answer on: of the second half of a dialogue, or of a lone answer."""
    first, _, rest = text.partition(_TURN)
    return [{"role": ASSISTANT, "content": first}, *(conversation(_TURN + rest) if rest else ())]
