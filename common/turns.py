"""Conversations: the turns that stand before an answer, as a model's chat template writes them.

Turns are what OpenAI's clients call messages: objects with `role` and `content`. First a system turn, where
there is one; then the user and the assistant by turns, the user first and last, since the assistant's is the
answer.

In a table a conversation is one string, as every value is: of equal conversations the same one, and a lone
turn of the user is its content. Two control characters keep turns apart; they are taken out of contents.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from common.cells import Cell, value_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, str]
TRAINING_DAY = datetime(2026, 1, 1)  # for templates that write the date: one for all sites, at every resume

_TODAY = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")
_TURN, _SAID = "\x02", "\x03"
_USER, _ASSISTANT, _SYSTEM = "user", "assistant", "system"
_WANTED = "a system turn or none, then turns of user and assistant, the user first and last"


def prompt_of(value: object, cell: Cell) -> str:
    """A conversation from a cell: the user's one turn, or a list of turns, or the JSON of one.

    Raises:
        DataError: a list is no conversation. No content is shown.
    """
    turns = turns_in(value)
    if turns is None:
        return user_turn(value_of(value, cell))
    kept: list[tuple[str, str]] = []
    for number, turn in enumerate(turns, start=1):
        given = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
        if set(given) != {"role", "content"}:
            raise cell.fault("turns with role and content, and nothing else", f"another turn {number}")
        content = unicodedata.normalize("NFC", user_turn(value_of(given["content"], cell))).strip()
        if not content:
            raise cell.fault("turns in which something is said", f"an empty turn {number}")
        kept.append((given["role"], content))
    roles = [role if role in (_USER, _ASSISTANT, _SYSTEM) else "another" for role, _ in kept]
    said = roles[1:] if roles[:1] == [_SYSTEM] else roles
    if len(said) % 2 == 0 or said != [(_USER, _ASSISTANT)[i % 2] for i in range(len(said))]:
        raise cell.fault(_WANTED, f"{len(roles)} turns of {', '.join(roles[:10])}" if roles else "no turn")
    if len(kept) == 1:
        return kept[0][1]
    return "".join(f"{_TURN}{role}{_SAID}{content}" for role, content in kept)


def user_turn(text: str) -> str:
    """`text` as the user's lone turn, whatever it looks like."""
    return text.replace(_TURN, "").replace(_SAID, "")


def turns_in(value: object) -> list[Any] | None:
    """The list that a cell holds, or the JSON of a list of turns; `None` where it is text."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    meant = isinstance(found, list) and found and all(isinstance(t, dict) and "role" in t for t in found)
    return found if meant else None


def conversation(prompt: str) -> list[Turn]:
    """The turns of what `prompt_of` made."""
    if not prompt.startswith(_TURN):
        return [{"role": _USER, "content": prompt}]
    parts = (turn.split(_SAID, 1) for turn in prompt[1:].split(_TURN))
    return [{"role": role, "content": content} for role, content in parts]


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], today: datetime | None = None
) -> list[int]:
    """The tokens of a conversation by the chat template, up to where the answer begins.

    `today`: the day that a template may write; `None`: this one.
    """
    template = tokenizer.get_chat_template()
    made = tokenizer.apply_chat_template(
        list(turns),
        chat_template=template if today is None else _on_day(template, today),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    return list(made["input_ids"])


@cache
def _on_day(template: str, day: datetime) -> str:
    """The template with `day` for today. transformers lets nobody pass a clock of their own to it."""
    dated = _TODAY.sub(lambda call: json.dumps(day.strftime(call[2])), template)
    if "strftime_now(" in dated:
        raise ValueError("the template writes a date that depends on more than the day")
    return dated
