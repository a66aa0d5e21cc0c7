"""The kinds of tasks, and what each needs of a configuration. The tasks themselves: common.tasks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Needs:
    """`auto`: the class of transformers with this kind's head; `peft`: as peft names the task, None where
    it has no name that will do."""

    auto: str
    peft: str | None
    label: bool = False  # reads data.label
    names: bool = False  # the labels are names: task.labels
    prompt: bool = False  # cannot do without data.prompt
    mean: bool = False  # may have the mean-pooled head


class TaskKind(Enum):
    SEQUENCE_CLASSIFICATION = "sequence-classification"  # one label a text, or a pair of texts
    MULTI_LABEL = "multi-label"  # any number of labels
    REGRESSION = "regression"  # a number
    TOKEN_CLASSIFICATION = "token-classification"  # a BIO tag a word
    QUESTION_ANSWERING = "question-answering"  # the answer is a stretch of the context
    CAUSAL_LM = "causal-lm"  # continue the prompt
    SEQ2SEQ = "sequence-to-sequence"  # an encoder reads, a decoder writes
    IMAGE_CLASSIFICATION = "image-classification"  # one label an image

    @property
    def writes(self) -> bool:
        """The answer is written, token by token."""
        return self in (TaskKind.CAUSAL_LM, TaskKind.SEQ2SEQ)

    @property
    def needs(self) -> Needs:
        match self:
            case TaskKind.SEQUENCE_CLASSIFICATION | TaskKind.MULTI_LABEL:
                return Needs(
                    "AutoModelForSequenceClassification", "SEQ_CLS", label=True, names=True, mean=True
                )
            case TaskKind.REGRESSION:
                return Needs("AutoModelForSequenceClassification", "SEQ_CLS", label=True, mean=True)
            case TaskKind.TOKEN_CLASSIFICATION:
                return Needs("AutoModelForTokenClassification", "TOKEN_CLS", label=True, names=True)
            case TaskKind.QUESTION_ANSWERING:
                # Not peft's QUESTION_ANS: that class keeps token types, which tell question and text apart,
                # from the model, so the adapter merged into its base would answer otherwise.
                return Needs("AutoModelForQuestionAnswering", None, label=True, prompt=True)
            case TaskKind.CAUSAL_LM:
                return Needs("AutoModelForCausalLM", "CAUSAL_LM")
            case TaskKind.SEQ2SEQ:
                return Needs("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", prompt=True)
            case TaskKind.IMAGE_CLASSIFICATION:
                return Needs("AutoModelForImageClassification", None, label=True, names=True)


def misfit(
    kind: TaskKind,
    *,
    labels: tuple[str, ...],
    class_weights: tuple[float, ...],
    range_: tuple[float, float] | None,
    chat: bool,
    label: str | None,
    prompt: str | None,
    template: str | None,
    mean_head: bool,
) -> str | None:
    """What of a configuration does not fit its kind of task, in words; `None` where all does."""
    needs, name = kind.needs, kind.value
    if needs.label and label is None:
        return f"data.label: {name} needs a label column"
    if needs.prompt and prompt is None:
        what = "question" if kind is TaskKind.QUESTION_ANSWERING else "input"
        return f"data.prompt: {name} needs the column of the {what}"
    if mean_head and not needs.mean:
        able = ", ".join(k.value for k in TaskKind if k.needs.mean)
        return f"model.head: 'mean' is for {able} on encoders"
    if labels and not needs.names:
        return f"task.labels: {name} has no labels with names; leave it out"
    if class_weights:
        if not needs.names:
            return f"task.class_weights: {name} has no classes; leave it out"
        if len(class_weights) != len(labels):
            return (
                f"task.class_weights: one for each of task.labels ({len(labels)}), in their order, found "
                f"{len(class_weights)}"
            )
    if kind is TaskKind.REGRESSION and (range_ is None or not range_[0] < range_[1]):
        return "task.range: regression needs the public range of its numbers, such as [0, 5]"
    if range_ is not None and kind is not TaskKind.REGRESSION:
        return f"task.range: is for regression, not {name}; leave it out"
    if chat and kind is not TaskKind.CAUSAL_LM:
        return f"task.chat: is for causal-lm, not {name}; leave it out"
    if chat and prompt is None and template is not None:
        return (
            "data.template: with task.chat an answer may be made by a template, a dialogue may not. Name the "
            "column of the conversation in data.prompt"
        )
    if template is not None and kind in (
        TaskKind.TOKEN_CLASSIFICATION,
        TaskKind.QUESTION_ANSWERING,
        TaskKind.IMAGE_CLASSIFICATION,
    ):
        return f"data.template: {name} reads its text as it stands in one column (data.text)"
    return None
