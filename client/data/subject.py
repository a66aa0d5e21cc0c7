"""What is looked at: a data file, the columns of it that training reads, and what the task expects there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.datasets import FileKind, kind_of
from common.errors import ConfigError
from common.kinds import TaskKind
from common.tables import Columns

if TYPE_CHECKING:
    from common.config import ModelSection

MAX_CHARACTERS = 20_000  # data.max_characters' default, for a file without a configuration


@dataclass(frozen=True)
class Subject:
    """`kind` None: no configuration says what the task is. `epsilon`: of one record, over the whole run."""

    train: Path
    test: Path | None
    columns: Columns
    person: str | None = None
    kind: TaskKind | None = None
    labels: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    max_characters: int = MAX_CHARACTERS
    model: ModelSection | None = None
    epsilon: float | None = None
    guessed_label: bool = False  # nobody named the label column: it may be missing

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that hold running text."""
        prompt = () if self.columns.prompt is None else (self.columns.prompt,)
        answer = (self.columns.label,) if self.kind is TaskKind.QUESTION_ANSWERING else ()
        return tuple(dict.fromkeys(name for name in (*self.columns.parts, *prompt, *answer) if name))

    @property
    def classes(self) -> bool:
        """The label column holds names of classes, one or several a record."""
        if self.columns.label is None:
            return False
        return self.kind in (
            None,
            TaskKind.SEQUENCE_CLASSIFICATION,
            TaskKind.MULTI_LABEL,
            TaskKind.IMAGE_CLASSIFICATION,
        )


def subject_of(
    given: Path,
    *,
    test: Path | None = None,
    person: str | None = None,
    text: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
) -> Subject:
    """Of a configuration (.toml) or of a data file; what is named here goes before what stands there.

    Raises:
        ConfigError: the configuration is wrong, or its data are a built-in sample.
        DataError: nothing is there, or it is of no known kind.
    """
    subject = _of_config(given) if given.suffix.lower() == ".toml" else _of_file(given)
    columns = replace(
        subject.columns,
        text=text or subject.columns.text,
        label=label or subject.columns.label,
        prompt=prompt or subject.columns.prompt,
        template=None if text else subject.columns.template,
    )
    return replace(
        subject,
        test=subject.test if test is None else test,
        person=person,
        columns=columns,
        guessed_label=subject.guessed_label and label is None,
    )


def _of_config(path: Path) -> Subject:
    from common.config import load_config
    from common.targets import columns_of

    config = load_config(path)
    if config.data.train is None:
        raise ConfigError(
            f"data.train: expected a data file to look at, found the built-in sample "
            f"{config.data.sample!r} (in {path})"
        )
    if config.task.kind is TaskKind.IMAGE_CLASSIFICATION:
        raise ConfigError(
            f"task.kind: this looks at text, found {config.task.kind.value} (in {path}). Give the data file "
            "itself, to have its labels looked at: --text names the column of the paths."
        )
    return Subject(
        train=config.data.train,
        test=config.data.test,
        columns=columns_of(config.data, config.task.kind, config.task.chat),
        kind=config.task.kind,
        labels=config.task.labels,
        bounds=config.task.range,
        max_characters=config.data.max_characters,
        model=config.model,
        epsilon=config.privacy.target_epsilon,
    )


def _of_file(path: Path) -> Subject:
    match kind_of(path):
        case FileKind.CONLL:
            columns = Columns("tokens", "tags", joint=" ")
            return Subject(path, None, columns, kind=TaskKind.TOKEN_CLASSIFICATION)
        case FileKind.SQUAD:
            columns = Columns("context", "answers", prompt="question", spans=True)
            return Subject(path, None, columns, kind=TaskKind.QUESTION_ANSWERING)
        case _:
            return Subject(path, None, Columns("text", "label"), guessed_label=True)
