"""Answers that lie in the text: a tag for each word, or a stretch of a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from common.config import TaskKind
from common.errors import DataError, ModelError
from common.examples import NO_TARGET, Batch, Examples, Ragged, pack
from common.tables import Table
from common.targets import tag_ids
from common.task_classify import MADE_UP_LENGTHS, class_weights, made_up_text
from common.text_metrics import entities, exact, f1, word_f1

_LONGEST_ANSWER = 30  # tokens of an answer that is looked for


@dataclass(frozen=True)
class TokenClassification:
    """A BIO tag a word, borne by the word's first token; the others, and words cut off, bear no loss.

    Loss: the mean over the record's own words of the cross-entropy, times the tag's public weight; correct:
    the share of its words with the right tag. Sums: entities that are right, said, and wanted (an entity is
    right if type and both ends are), and words that are right, and all.
    """

    labels: tuple[str, ...]
    weights: tuple[float, ...] = ()
    kind: TaskKind = TaskKind.TOKEN_CLASSIFICATION

    @property
    def outputs(self) -> int:
        return len(self.labels)

    def encode(self, table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
        tags = tag_ids(table, self.labels)
        encoded = _with_offsets(tokenizer, list(table.text), None, max_length)
        targets = []
        for text, offsets, of_words in zip(table.text, encoded["offset_mapping"], tags, strict=True):
            targets.append([NO_TARGET if w is None else of_words[w] for w in first_tokens(text, offsets)])
        return pack(encoded["input_ids"], Ragged.of(targets))

    def made_up(self, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> Examples:
        rows = [rng.integers(0, self.outputs, length) for length in MADE_UP_LENGTHS]
        for row in rows:
            row[0] = NO_TARGET
        return made_up_text(rng, tokenizer, Ragged.of([row.tolist() for row in rows]))

    def record_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        target = batch.target
        losses = functional.cross_entropy(
            logits.float().transpose(1, 2), target, reduction="none", ignore_index=NO_TARGET
        )
        if self.weights:
            losses = losses * class_weights(self.weights, target)
        return own_mean(losses, target != NO_TARGET)

    def correct(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return own_mean((logits.argmax(dim=-1) == batch.target).float(), batch.target != NO_TARGET)

    def record_sums(
        self, logits: torch.Tensor, batch: Batch, tokenizer: PreTrainedTokenizerBase
    ) -> torch.Tensor:
        rows = []
        for said, wanted in zip(logits.argmax(dim=-1).cpu(), batch.target.cpu(), strict=True):
            own = wanted != NO_TARGET
            ours, theirs = (entities([self.labels[i] for i in tags[own].tolist()]) for tags in (said, wanted))
            right = int((said[own] == wanted[own]).sum())
            rows.append([len(ours & theirs), len(ours), len(theirs), right, int(own.sum())])
        return torch.tensor(rows)

    def scores(self, sums: NDArray[np.float64], count: int) -> dict[str, float]:
        both, said, true, right, words = sums.tolist()
        return {
            "entity F1": f1(both, said, true),
            "precision": both / said if said else 0.0,
            "recall": both / true if true else 0.0,
            "word accuracy": right / max(words, 1),
        }


@dataclass(frozen=True)
class ExtractiveQA:
    """Where in the context the answer to the question lies. `prompt` is the question, `text` the context.

    Loss: half the cross-entropy of the answer's first token plus half that of its last, over the tokens of
    the record's own context. A context that is too long loses its end; a record whose answer is cut off
    bears no loss, and counts as answered wrongly. `target` is `(records, 4)`: first and last token of the
    answer (`NO_TARGET` where it is cut off), first and last token of the context. Correct: both ends are
    right. Sums: SQuAD's exact matches and F1, and answers that are not cut off.
    """

    labels: tuple[str, ...] = ()
    kind: TaskKind = TaskKind.QUESTION_ANSWERING
    outputs: int = 0

    def encode(self, table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
        if table.prompt is None or table.label is None or table.start is None:
            raise DataError(f"{table.source}: expected questions and answers: set data.prompt and data.label")
        encoded = _with_offsets(tokenizer, list(table.prompt), list(table.text), max_length)
        targets = []
        for record, (answer, start) in enumerate(zip(table.label, table.start, strict=True)):
            inside = [i for i, part in enumerate(encoded.sequence_ids(record)) if part == 1]
            targets.append(_span(encoded["offset_mapping"][record], inside, start, start + len(answer)))
        if all(target[0] == NO_TARGET for target in targets):
            raise DataError(
                f"{table.source}: every answer lies beyond the first {max_length} tokens of question and "
                "context: raise model.max_length, or shorten the contexts"
            )
        return pack(encoded["input_ids"], np.array(targets, dtype=np.int64), encoded.get("token_type_ids"))

    def made_up(self, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> Examples:
        return made_up_text(rng, tokenizer, np.array([[1, 2, 1, 3], [4, 7, 2, 8], [3, 3, 2, 5]]))

    def _scores_inside(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """`(n, 2, longest)`: scores of the first and the last token, very low outside the context."""
        position = torch.arange(logits.shape[1], device=logits.device)
        outside = (position < batch.target[:, 2:3]) | (position > batch.target[:, 3:4])
        ends = logits.float().transpose(1, 2)
        return ends.masked_fill(outside[:, None], torch.finfo(ends.dtype).min / 4)

    def record_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        ends = self._scores_inside(logits, batch).transpose(1, 2)
        target = batch.target[:, :2]
        losses = functional.cross_entropy(ends, target, reduction="none", ignore_index=NO_TARGET)
        return losses.mean(dim=1)

    def answers(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """`(n, 2)`: first and last token of the best answer."""
        first, last = self._scores_inside(logits, batch).unbind(dim=1)
        length = first.shape[1]
        pairs = first[:, :, None] + last[:, None, :]
        fits = torch.ones(length, length, dtype=torch.bool, device=logits.device).triu()
        fits &= ~fits.triu(_LONGEST_ANSWER)
        best = pairs.masked_fill(~fits, -torch.inf).flatten(1).argmax(dim=1)
        return torch.stack([best // length, best % length], dim=1)

    def correct(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return (self.answers(logits, batch) == batch.target[:, :2]).all(dim=1).float()

    def record_sums(
        self, logits: torch.Tensor, batch: Batch, tokenizer: PreTrainedTokenizerBase
    ) -> torch.Tensor:
        rows = []
        for ids, said, target in zip(
            batch.inputs["input_ids"], self.answers(logits, batch), batch.target, strict=True
        ):
            if int(target[0]) == NO_TARGET:
                rows.append([0.0, 0.0, 0.0])
                continue
            ours, theirs = (
                str(tokenizer.decode(ids[int(first) : int(last) + 1])) for first, last in (said, target[:2])
            )
            rows.append([exact(ours, theirs), word_f1(ours, theirs), 1.0])
        return torch.tensor(rows, dtype=torch.float64)

    def scores(self, sums: NDArray[np.float64], count: int) -> dict[str, float]:
        matches, overlap, whole = sums.tolist()
        return {"F1": overlap / count, "exact match": matches / count, "answers not cut off": whole / count}


def own_mean(values: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """`(n,)`: the mean over each record's own places; 0 where it has none."""
    return (values * own).sum(dim=1) / own.sum(dim=1).clamp(min=1)


def first_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """For each token: the number of the word whose first token it is, else None. Blanks part words.

    By the last character of a token, since some tokenizers count the blank before a word to its token.
    """
    word_of: list[int | None] = []
    number = 0
    for character in text:
        word_of.append(None if character == " " else number)
        number += character == " "
    found: list[int | None] = []
    seen = -1
    for start, end in offsets:
        word = word_of[end - 1] if end > start else None
        new = word is not None and word > seen
        found.append(word if new else None)
        seen = word if new and word is not None else seen
    return found


def _span(
    offsets: Sequence[tuple[int, int]], inside: Sequence[int], start: int, end: int
) -> tuple[int, int, int, int]:
    """The target of a record whose answer is characters `start` to `end` of the context."""
    if not inside:
        return NO_TARGET, NO_TARGET, 0, 0
    first, last = inside[0], inside[-1]
    touched = [i for i in inside if offsets[i][0] < end and offsets[i][1] > start]
    if not touched or offsets[last][1] < end:
        return NO_TARGET, NO_TARGET, first, last
    return touched[0], touched[-1], first, last


def _with_offsets(
    tokenizer: PreTrainedTokenizerBase, first: list[str], second: list[str] | None, max_length: int
) -> Any:
    if not tokenizer.is_fast:
        raise ModelError(
            "this task needs a tokenizer that tells where in the text a token stands: add tokenizer.json to "
            "the model's folder"
        )
    encoded: Mapping[str, Any] = tokenizer(
        first, second, truncation=True, max_length=max_length, return_offsets_mapping=True
    )
    return encoded
