"""Answers that are written, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from common.chat_template import TRAINING_DAY, answer_form, dialogue_ids
from common.config import TaskKind
from common.errors import DataError, ModelError
from common.examples import NO_TARGET, Batch, Examples, Ragged, pack
from common.tables import Table
from common.task_classify import MADE_UP_LENGTHS, made_up_text
from common.task_tokens import own_mean

_MOST = 700.0  # a mean loss whose exponential is still a number


@dataclass(frozen=True)
class CausalLM:
    """Continue the prompt, or model the text where there is none.

    A record's loss is the mean over *its own* answer tokens. The usual mean over a batch's tokens makes
    one record's gradient depend on the others' lengths, which no clipping bounds.
    With `chat` a record is a conversation (common.turns), written by the model's chat template, and every
    answer in its text bears loss. `target` is ragged: the places of a record where an answer begins, where
    it ends, where the next one begins, and so on; the last may go to the end.
    Sums: the share of the answer's tokens that come first; the loss of the answer's tokens, and their number.
    """

    labels: tuple[str, ...] = ()
    kind: TaskKind = TaskKind.CAUSAL_LM
    outputs: int = 0
    chat: bool = False

    def encode(self, table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
        if self.chat:
            start: list[int] = []  # a template writes its own beginning
            read = _conversations(table, tokenizer, max_length)
        else:
            bos = tokenizer.bos_token_id
            start, read = [] if bos is None else [int(bos)], _texts(table, tokenizer)
        ids, own = [], []
        for tokens, places in read:
            # A long prompt keeps its end, and at least half of the length is left to what follows.
            cut = max(0, places[0] - (max_length // 2 - len(start)))
            ids.append((start + tokens[cut:])[:max_length])
            first, *more = (place - cut + len(start) for place in places)
            own.append([max(first, 1), *more])
        return pack(ids, Ragged.of(own, np.int64))

    def made_up(self, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> Examples:
        own = [[1]] * (len(MADE_UP_LENGTHS) - 1)
        return made_up_text(
            rng, tokenizer, Ragged.of([*own, [1, 2, 3]] if self.chat else [*own, [1]], np.int64)
        )

    def _own_tokens(self, logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Next-token labels `(n, longest - 1)` and which of them belong to the answer."""
        labels = batch.inputs["input_ids"][:, 1:]
        position = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        places = batch.target[:, :, None]
        passed = ((places != NO_TARGET) & (position >= places)).sum(dim=1)
        return labels, (batch.inputs["attention_mask"][:, 1:] == 1) & (passed % 2 == 1)

    @staticmethod
    def _own_mean(values: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return own_mean(values, own)

    def _token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")

    def record_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        labels, own = self._own_tokens(logits, batch)
        return self._own_mean(self._token_losses(logits, labels), own)

    def correct(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        labels, own = self._own_tokens(logits, batch)
        return self._own_mean((logits[:, :-1].argmax(dim=-1) == labels).float(), own)

    def record_sums(
        self, logits: torch.Tensor, batch: Batch, tokenizer: PreTrainedTokenizerBase
    ) -> torch.Tensor:
        labels, own = self._own_tokens(logits, batch)
        losses = self._token_losses(logits, labels)
        return written_sums(self.correct(logits, batch), losses, own)

    def scores(self, sums: NDArray[np.float64], count: int) -> dict[str, float]:
        return written_scores(sums, count)


_Read = Sequence[tuple[list[int], list[int]]]  # of each record the tokens; the places in them, as of `target`


def _texts(table: Table, tokenizer: PreTrainedTokenizerBase) -> _Read:
    """Prompt and text as they stand, and the end token."""
    end = _end(tokenizer.eos_token_id)
    texts = tokenizer(list(table.text), add_special_tokens=False)["input_ids"]
    if table.prompt is None:
        return [([*text, end], [0]) for text in texts]
    prompts = tokenizer(list(table.prompt), add_special_tokens=False)["input_ids"]
    return [([*prompt, *text, end], [len(prompt)]) for prompt, text in zip(prompts, texts, strict=True)]


def _conversations(table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> _Read:
    """As the chat template writes them."""
    form = answer_form(tokenizer)
    _end(form.end)
    if table.prompt is None:
        raise DataError(f"{table.source}: expected conversations (task.chat), found texts")
    found = []
    for row, prompt, text in zip(table.rows, table.prompt, table.text, strict=True):
        try:
            found.append(dialogue_ids(tokenizer, prompt, text, form, TRAINING_DAY, max_length))
        except ModelError as error:
            raise DataError(f"{table.source}, row {row}: {error}") from None
    return found


def _end(token: int | None) -> int:
    if token is None:
        raise DataError("the tokenizer has no end-of-sequence token, which causal-lm needs")
    return int(token)


@dataclass(frozen=True)
class Seq2Seq:
    """An encoder reads the prompt, a decoder writes the text; in training it reads the true text so far.

    Loss: the mean over the record's own tokens of the text, its end token too. Both are cut to max_length.
    Sums: as of `CausalLM`.
    """

    labels: tuple[str, ...] = ()
    kind: TaskKind = TaskKind.SEQ2SEQ
    outputs: int = 0

    def encode(self, table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
        if table.prompt is None:
            raise DataError(f"{table.source}: expected a column to read from: set data.prompt")
        read = tokenizer(list(table.prompt), truncation=True, max_length=max_length)["input_ids"]
        written = tokenizer(text_target=list(table.text), truncation=True, max_length=max_length)["input_ids"]
        return pack(read, Ragged.of(written), decodes=True)

    def made_up(self, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> Examples:
        written = [rng.integers(0, int(tokenizer.vocab_size), length).tolist() for length in (4, 2, 6)]
        read = made_up_text(rng, tokenizer, Ragged.of(written))
        return Examples(read.tokens, read.starts, read.target, decodes=True)

    def _token_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(
            logits.float().transpose(1, 2), batch.target, reduction="none", ignore_index=NO_TARGET
        )

    def record_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return own_mean(self._token_losses(logits, batch), batch.target != NO_TARGET)

    def correct(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return own_mean((logits.argmax(dim=-1) == batch.target).float(), batch.target != NO_TARGET)

    def record_sums(
        self, logits: torch.Tensor, batch: Batch, tokenizer: PreTrainedTokenizerBase
    ) -> torch.Tensor:
        losses = self._token_losses(logits, batch)
        return written_sums(self.correct(logits, batch), losses, batch.target != NO_TARGET)

    def scores(self, sums: NDArray[np.float64], count: int) -> dict[str, float]:
        return written_scores(sums, count)


def written_sums(correct: torch.Tensor, losses: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """`(n, 3)`: the share of right tokens, the loss of all tokens, their number."""
    return torch.stack([correct.double(), (losses * own).double().sum(dim=1), own.double().sum(dim=1)], dim=1)


def written_scores(sums: NDArray[np.float64], count: int) -> dict[str, float]:
    right, loss, tokens = sums.tolist()
    return {
        "token accuracy": right / count,
        "perplexity": math.exp(min(loss / max(tokens, 1), _MOST)),
    }
