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
from weakref import WeakKeyDictionary

from common.errors import ModelError
from common.turns import ASSISTANT, SYSTEM, USER, Turn, answers, conversation, tidied

if TYPE_CHECKING:
    from transformers import AddedToken, PreTrainedTokenizerBase

TRAINING_DAY = datetime(2026, 1, 1)  # for templates that write the date: one for all sites, at every resume

_TODAY = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")
_OWN = re.compile(
    r"\W+((begin|end)_of_)?(think|thinking|thought|reasoning|tool_calls?|python_tag)\W+", re.IGNORECASE
)
_NEXT: Turn = {"role": USER, "content": "2"}  # what is said after an answer, so that its end is written
_ANSWERS: tuple[Turn, Turn] = ({"role": ASSISTANT, "content": "0"}, {"role": ASSISTANT, "content": "1"})
_OPENINGS: tuple[Sequence[Turn], ...] = ((_NEXT,), ({"role": SYSTEM, "content": "2"}, _NEXT))
_ANEW = "writes the past anew with each turn"


@dataclass(frozen=True)
class _Marks:
    """Added tokens of a tokenizer, as its template has them. `controls`: those that are text in what is said,
    `own` of them what a model writes in an answer, around thoughts and calls of tools."""

    template: str
    controls: frozenset[str]
    own: frozenset[str]


_SETTLED: WeakKeyDictionary[PreTrainedTokenizerBase, _Marks] = WeakKeyDictionary()


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
        marks = _SETTLED.get(tokenizer)
        if isinstance(error, ValueError) and marks and _standing(marks.controls, turns):
            raise _no_text() from None
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
    if tokenizer not in _SETTLED or _SETTLED[tokenizer].template != template:
        _SETTLED[tokenizer] = _marks(tokenizer, template)
        tokenizer.chat_control_tokens = sorted(_SETTLED[tokenizer].controls)
    return _rendered(tokenizer, turns, template if today is None else _on_day(template, today))


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], template: str, *, sanitize: bool = True
) -> list[int]:
    made = tokenizer.apply_chat_template(
        [{**turn, "content": tidied(turn["content"])} for turn in turns],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        sanitize_control_tokens=sanitize,
    )
    return list(made["input_ids"])


def _marks(tokenizer: PreTrainedTokenizerBase, template: str) -> _Marks:
    """transformers knows as controls only what is special, or stands in the template word for word: what the
    template puts together, or takes from the tokenizer, is found by what it writes."""
    dated = template
    with contextlib.suppress(ValueError):
        dated = _on_day(template, TRAINING_DAY)
    around = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for begun in _OPENINGS:
        with contextlib.suppress(Exception):  # not every template takes each of them
            around.update(_rendered(tokenizer, begun, dated, sanitize=False))
            said, other = (
                _rendered(tokenizer, [*begun, answer, _NEXT], dated, sanitize=False) for answer in _ANSWERS
            )
            around.update(said[_alike(said, other) :])
    added = _added(tokenizer)
    special = {token.content for token in added.values() if token.special}
    turns = {t.content for i, t in added.items() if i in around and not _OWN.fullmatch(t.content)}
    literal = {t.content for t in added.values() if t.content in template}
    controls = special | turns | literal | set(tokenizer.chat_control_tokens or ())
    own = {token for token in controls - turns if token not in special or _OWN.fullmatch(token)}
    return _Marks(template, frozenset(controls), frozenset(own))


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, AddedToken]:
    """The tokens that were added to the words of the tokenizer, but for blanks."""
    return {i: t for i, t in tokenizer.added_tokens_decoder.items() if not t.content.isspace()}


def _standing(tokens: frozenset[str], turns: Sequence[Turn]) -> set[str]:
    """Those of `tokens` that stand in what is said."""
    return {token for token in tokens if any(token in turn["content"] for turn in turns)}


def _bare(tokenizer: PreTrainedTokenizerBase, answer: Turn) -> list[int]:
    """What an answer says, thoughts and all, without what a template writes around it.

    Raises:
        ModelError: control tokens stand in it that the tokenizer cannot read as text, or beside its own.
    """
    marks = _SETTLED[tokenizer]
    own = _standing(marks.own, [answer])
    if own and _standing(marks.controls, [answer]) - own:
        raise ModelError(
            "an answer holds thoughts or calls of tools, and other control tokens of the model: drop these"
        )
    try:
        return _rendered(tokenizer, [answer], "{{ messages[0]['content'] }}", sanitize=not own)
    except ValueError:
        raise _no_text() from None


def _no_text() -> ModelError:
    return ModelError(
        "a turn holds a control token of the model that its tokenizer cannot read as text: drop it"
    )


def _unfit(says: str) -> ModelError:
    cure = "Make records of one answer each, with data.prompt, or choose another model"
    return ModelError(f"the model's chat template {says}. {cure}")


def answer_form(tokenizer: PreTrainedTokenizerBase) -> AnswerForm:
    """How the chat template writes an answer, by what it makes of a conversation that we make up.

    An answer ends with the first of the tokenizer's added tokens that stands after it, since a model tuned on
    conversations may have an end of its own; where there is none, with the tokenizer's end token.

    Raises:
        ModelError: there is no template, or it takes no conversation.
    """
    text_end: int | None = tokenizer.eos_token_id
    begun = opening(tokenizer)
    asked = chat_ids(tokenizer, begun, TRAINING_DAY)
    try:
        said, other = (chat_ids(tokenizer, [*begun, answer, _NEXT], TRAINING_DAY) for answer in _ANSWERS)
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


def opening(tokenizer: PreTrainedTokenizerBase) -> Sequence[Turn]:
    """A conversation that the template takes: a question, after a system turn where it wants one.

    Raises:
        ModelError: there is no template, or it takes no conversation.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "task.chat: the model's tokenizer has no chat template. Choose a model that was tuned on "
            "conversations, or set task.chat to false"
        )
    why = ""
    for turns in _OPENINGS:
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
    added = _added(tokenizer)
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

    A lone answer that the template cannot write and end is written as it is, and the end token after it.

    Raises:
        ModelError: the template does not take it, or cannot be used for whole dialogues.
    """
    before, said = conversation(prompt), answers(text)
    asked = chat_ids(tokenizer, before, today)
    try:
        if form.fault:
            raise _unfit(form.fault)
        return _followed(tokenizer, before, said, asked, form, today, most)
    except ModelError:
        if len(said) > 1:
            raise
        end = () if form.end is None else (form.end,)
        return [*asked, *_bare(tokenizer, said[0]), *end], [len(asked)]


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
            raise _unfit(_ANEW)
        if long:
            return read[: len(read) - form.after], places
        end = next((i for i in range(len(ids), len(read)) if read[i] == form.end), None)
        if end is None:
            raise _unfit("ends some answers otherwise than others")
        answer = said[answered - 1]
        own = _standing(_SETTLED[tokenizer].own, [answer])
        if own or not _same_words(tokenizer, read[len(ids) : end], answer):
            raise _unfit("does not write an answer of the past as it stands, thoughts and all")
        if answered == len(said):
            return read[: end + 1], places
        places += [end + 1, len(read)]
        ids, answered = read, answered + 2


def _same_words(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], answer: Turn) -> bool:
    """Whether `ids` are what the answer says: but for blanks, which templates put around answers."""
    written, said = (tokenizer.decode(part) for part in (ids, _bare(tokenizer, answer)))
    return "".join(written.split()) == "".join(said.split())


@cache
def _on_day(template: str, day: datetime) -> str:
    """The template with `day` for today. transformers lets nobody pass a clock of their own to it."""
    dated = _TODAY.sub(lambda call: json.dumps(day.strftime(call[2])), template)
    if "strftime_now(" in dated:
        raise ValueError("it writes a date that depends on more than the day")
    return dated
