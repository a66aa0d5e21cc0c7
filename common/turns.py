"""Conversations: the turns that stand before an answer, as a model's chat template writes them.

Turns are what OpenAI's clients call messages: objects with `role` and `content`. First a system turn, where
there is one; then the user and the assistant by turns, the user first and last, since the assistant's is the
answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.cells import Cell, short, value_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, str]


def listed_turns(text: str) -> list[Turn] | None:
    """The JSON list of objects that `text` is, or `None`."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and found and all(isinstance(t, dict) for t in found) else None


def is_turns(value: object) -> bool:
    """A list, or the JSON of one: meant as a conversation."""
    return isinstance(value, list) or (isinstance(value, str) and listed_turns(value) is not None)


def prompt_of(value: object, cell: Cell) -> str:
    """A cell that holds the user's one turn, or a list of turns; the list, or its JSON, becomes JSON.

    Raises:
        DataError: a list is no conversation. Roles are shown, contents are not.
    """
    turns = value if isinstance(value, list) else listed_turns(value_of(value, cell))
    if turns is None:
        return value_of(value, cell)
    kept = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise cell.fault("turns with role and content, and nothing else", f"another turn {number}")
        kept.append({"role": turn["role"], "content": value_of(turn["content"], cell)})
    roles = [str(turn["role"]) for turn in kept]
    said = roles[1:] if roles[:1] == ["system"] else roles
    if len(said) % 2 == 0 or said != [("user", "assistant")[i % 2] for i in range(len(said))]:
        raise cell.fault(
            "a system turn or none, then turns of user and assistant, the user first and last",
            short(", ".join(roles)),
        )
    return json.dumps(kept, ensure_ascii=False)


def conversation(prompt: str) -> list[Turn]:
    """The turns of what `prompt_of` made."""
    return listed_turns(prompt) or [{"role": "user", "content": prompt}]


def chat_ids(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[int]:
    """The tokens of a conversation by the chat template, up to where the answer begins."""
    made = tokenizer.apply_chat_template(
        list(turns), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(made["input_ids"])
