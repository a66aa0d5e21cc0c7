"""Task kinds: how records become tokens, what one record's loss is, and which sums measure success.

To add a task: one class with the members of `Task`, one member of `TaskKind` with its needs, one line in
`make_task`; docs/extending.md has an example. Every loss is *per record* and depends on that record alone;
anything else has no bounded sensitivity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from common.config import TaskKind, TaskSection
from common.errors import ConfigError
from common.examples import Batch, Examples, IntArray, by_length, collate
from common.tables import Table
from common.task_classify import MultiLabel, Regression, SequenceClassification
from common.task_generate import CausalLM, Seq2Seq
from common.task_images import ImageClassification
from common.task_tokens import ExtractiveQA, TokenClassification

__all__ = ["Batch", "Examples", "IntArray", "Task", "by_length", "collate", "make_task"]


class Task(Protocol):
    """What a task must say. Metrics are sums over records, so that they can be aggregated securely."""

    @property
    def kind(self) -> TaskKind: ...
    @property
    def labels(self) -> tuple[str, ...]: ...  # names of a head's outputs; empty where they have none
    @property
    def outputs(self) -> int: ...  # of the head that is added to the model; 0: the model's own

    def encode(self, table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples: ...

    def made_up(self, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> Examples:
        """Three records of nobody, of unlike lengths, for the self-test."""
        ...

    def record_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """`(n,)`: the loss of each record, from that record alone."""
        ...

    def correct(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """`(n,)` in [0, 1]: how right each record's answer is."""
        ...

    def record_sums(
        self, logits: torch.Tensor, batch: Batch, tokenizer: PreTrainedTokenizerBase
    ) -> torch.Tensor:
        """`(n, k)`: each record's part in the sums from which `scores` are made."""
        ...

    def scores(self, sums: NDArray[np.float64], count: int) -> dict[str, float]:
        """The metrics by name, from the sums `(k,)` over `count` records; the first is the chief one."""
        ...


def make_task(kind: TaskKind, labels: Sequence[str], section: TaskSection | None = None) -> Task:
    """The task of this kind with these labels; `section` has what the configuration says beyond them."""
    names = tuple(labels)
    weights = () if section is None else section.class_weights
    if kind.needs.names and len(names) < 2:
        raise ConfigError(
            f"{kind.value} needs at least two labels, found {list(names)}: check data.label, or set "
            "task.labels"
        )
    match kind:
        case TaskKind.SEQUENCE_CLASSIFICATION:
            return SequenceClassification(names, weights)
        case TaskKind.MULTI_LABEL:
            return MultiLabel(names, weights)
        case TaskKind.REGRESSION:
            if section is None or section.range is None:
                raise ConfigError("task.range: regression needs the public range of its numbers")
            return Regression(section.range)
        case TaskKind.TOKEN_CLASSIFICATION:
            return TokenClassification(names, weights)
        case TaskKind.QUESTION_ANSWERING:
            return ExtractiveQA()
        case TaskKind.CAUSAL_LM:
            return CausalLM(chat=section is not None and section.chat)
        case TaskKind.SEQ2SEQ:
            return Seq2Seq()
        case TaskKind.IMAGE_CLASSIFICATION:
            return ImageClassification(names, weights)
