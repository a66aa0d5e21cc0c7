"""`confide predict`, `ask` and `export`: a trained adapter at work, or handed on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigError, DataError, ModelError
from common.exported import Form

if TYPE_CHECKING:
    from common.prediction import Predictor
    from common.tables import Columns, Table

Adapter = Annotated[Path, typer.Argument(help="A run's folder, its `adapter`, or what confide export wrote.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def predict(
    adapter: Adapter,
    text: Annotated[
        str | None, typer.Argument(help="One text. None: --file, or a text a line on standard input.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="The question, or the first of a pair, to the one text.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="csv, tsv, jsonl, parquet, a `datasets` folder, or .txt.", show_default=False),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the text in the file.")] = "text",
    prompt_column: Annotated[
        str | None, typer.Option(help="Column of the question or first text.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Records in one forward pass.")] = 32,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, in order.")] = False,
) -> None:
    """Answer texts with a trained adapter: one, a file of them, or standard input.

    On standard input a line is a text, or a JSON object with `text` (and `prompt`). Answers come in the
    order of the records.
    """
    from common.prediction import open_adapter

    predictor = open_adapter(adapter, device)
    table = _asked(predictor, text, prompt, file, text_column, prompt_column)
    for answer in predictor(table, batch):
        print(json.dumps(answer, ensure_ascii=False) if as_json else _plain(answer), flush=True)


def ask(
    adapter: Adapter,
    question: Annotated[
        str | None, typer.Argument(help="One question. None: a conversation, a line each.")
    ] = None,
    longest: Annotated[int, typer.Option("--max-tokens", min=1, help="Of an answer.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the likeliest next token; higher: more varied.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Draw among the likeliest tokens of this much.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Of the draws.", show_default=False)
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Keep the conversation, in the form of the model's chat template."),
    ] = False,
    system: Annotated[
        str, typer.Option(help="A system turn, where the adapter reads conversations.", show_default=False)
    ] = "",
    device: Device = "auto",
) -> None:
    """Talk to an adapter of a causal language model; answers are written as they come.

    Without --chat each question stands alone, as the prompts did in training. An empty line ends.
    """
    from common.prediction import open_adapter
    from common.speaking import Speaker

    speaker = Speaker.of(open_adapter(adapter, device), longest, temperature, top_p, seed, chat, system)
    if question is not None:
        speaker.answer(question, sys.stdout)
        return
    refused: ModelError | DataError | None = None
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            break
        try:
            speaker.answer(line, sys.stdout)
        except (ModelError, DataError) as error:  # of this question: the conversation goes on without it
            print(f"error: {error}", file=sys.stderr)
            refused = error
    if refused is not None:
        raise typer.Exit(refused.exit_code)


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder, or its `adapter`.")
    ],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A folder that is not there yet.")],
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="peft: the adapter. merged: a whole model for transformers. gguf: one file for llama.cpp.",
        ),
    ] = Form.PEFT,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
) -> None:
    """Hand an adapter on: as it is, merged into its base model, or as one GGUF file.

    A whole model is read back before it counts as written, and must give the adapter's own logits. Model
    card and privacy statement go along.
    """
    from common.release import release

    done = release(source, to, form)
    if as_json:
        told = {"folder": str(done.folder), "format": form.value, "logits_differ_by": done.difference}
        print(json.dumps({**told, "privacy": done.privacy}, ensure_ascii=False))
        return
    print(done.folder)
    if done.difference is not None:
        print(f"read back: logits differ from the adapter's on its base by at most {done.difference:.1g}")
    print(done.privacy)


def _asked(
    predictor: Predictor,
    text: str | None,
    prompt: str | None,
    file: Path | None,
    text_column: str,
    prompt_column: str | None,
) -> Table:
    from common.datasets import read_table
    from common.tables import table_of

    if text is not None and file is not None:
        raise ConfigError("give a text or --file, not both")
    if file is not None and file.suffix.lower() != ".txt":
        return read_table(file, _columns(predictor, text_column, prompt_column))
    # Paths of images are read from the folder where the command runs, as the names here have none.
    source = Path("input" if text is not None else "standard input" if file is None else file.name)
    records = [(1, text, prompt)] if text is not None else list(_lines(file, source, prompt))
    if not records:
        raise DataError("no text to answer: give one, --file, or lines on standard input")
    if predictor.section.chat:  # the conversation stands in either of the two
        records = [(row, _spoken(t if p is None else p), None) for row, t, p in records]
    alone = [row for row, _, p in records if p is None]
    if 0 < len(alone) < len(records):
        raise DataError(
            f"{source}, row {alone[0]}: expected a prompt, as other records have one, found none. Give every "
            "record a prompt, or none"
        )
    columns = _columns(predictor, "text", None if alone else "prompt")
    return table_of(source, columns, ((row, {"text": t, "prompt": p}) for row, t, p in records))


def _spoken(value: Any) -> Any:
    """Turns as they are; of text the user's one turn, whatever it looks like."""
    from common.turns import turns_in

    alone = isinstance(value, str) and turns_in(value) is None
    return [{"role": "user", "content": value}] if alone else value


def _columns(predictor: Predictor, text: str, prompt: str | None) -> Columns:
    from common.config import DataSection
    from common.tables import Columns
    from common.targets import columns_of

    if predictor.section.chat:
        column = prompt or text
        return Columns(column, None, column, turns=True)
    joint = columns_of(DataSection(text=text, prompt=prompt), predictor.kind).joint
    return Columns(text, None, prompt, joint=joint)


def _lines(file: Path | None, source: Path, prompt: str | None) -> Iterator[tuple[int, Any, Any]]:
    """Row, text and prompt of each line that is not empty; as a JSON object has them, or as it is."""
    from common.datasets import utf8

    data = sys.stdin.buffer.read() if file is None else file.read_bytes()
    for row, line in enumerate(utf8(data, source).split("\n"), start=1):
        record: dict[str, Any] = {"text": line.strip()}
        if line.lstrip().startswith("{"):
            try:
                record = json.loads(line)
                record["text"]
            except (ValueError, KeyError, RecursionError):
                raise DataError(
                    f"{source}, row {row}: expected a text, or a JSON object with `text` in it"
                ) from None
        elif not line.strip():
            continue
        yield row, record["text"], record.get("prompt", prompt)


def _plain(answer: dict[str, Any]) -> str:
    match answer:
        case {"label": label, "probability": probability}:
            return f"{label}\t{probability:.3f}"
        case {"labels": dict() as labels}:
            return "\t".join(f"{label} {p:.3f}" for label, p in labels.items()) or "none"
        case {"entities": list() as entities}:
            return "\t".join(f"{e['type']}: {e['text']}" for e in entities) or "none"
        case {"value": float() as value}:
            return f"{value:.4g}"
        case _:
            return str(next(iter(answer.values())))
