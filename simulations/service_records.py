"""`POST /predict`: records as JSON, answers as `confide predict --json` gives them."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from common.config import TaskKind
from common.errors import ConfideError
from common.images import image_text
from common.prediction import Predictor
from common.tables import Table
from simulations.service_line import ONE, ONE_OR_SEVERAL, SEVERAL, Line, Words, bad_request, shutting_down

MOST = 256  # records in one request
_MOST_PIXELS = 50_000_000
_BATCH = 16  # between two batches the service may be shut down


class Record(BaseModel):
    """A text, with its question or the first of its pair in `prompt`; or an image file as base64."""

    model_config = ConfigDict(strict=True, extra="forbid")

    text: Words | None = None
    prompt: Words | None = None
    image: str | None = None


Records = Annotated[
    Annotated[Record, ONE] | Annotated[list[Record], Field(min_length=1, max_length=MOST), SEVERAL],
    ONE_OR_SEVERAL,
]


def table_of(kind: TaskKind, records: Sequence[Record]) -> Table:
    """
    Raises:
        ServiceError: a record does not fit the task.
    """
    images = kind is TaskKind.IMAGE_CLASSIFICATION
    texts, prompts = [], []
    for place, record in enumerate(records):
        where = f"record {place + 1}"
        if images:
            if record.image is None or record.text is not None or record.prompt is not None:
                raise bad_request(f"{where}: expected `image`, a file as base64, and nothing else")
            texts.append(_image(record.image, where))
            continue
        if record.text is None or record.image is not None:
            raise bad_request(f"{where}: expected `text`, and `prompt` where the task has one")
        if not record.text.strip():
            raise bad_request(f"{where}: `text` is empty")
        texts.append(record.text)
        if record.prompt is not None:
            prompts.append(record.prompt)
    if prompts and len(prompts) != len(records):
        raise bad_request("either every record has a prompt or none has one")
    rows = tuple(range(1, len(records) + 1))
    return Table("the request", tuple(texts), None, tuple(prompts) or None, None, rows)


def _image(encoded: str, where: str) -> str:
    try:
        content = base64.b64decode(encoded, validate=True)
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except (binascii.Error, ValueError, OSError, Image.DecompressionBombError):
        raise bad_request(f"{where}: `image` is no image file as base64") from None
    if width * height > _MOST_PIXELS:
        raise bad_request(f"{where}: an image may have {_MOST_PIXELS:,} pixels, found {width * height:,}")
    return image_text({"bytes": content}, Path())


def answer(predictor: Predictor, line: Line, table: Table) -> list[dict[str, Any]]:
    """In the model's thread: the answers, in order.

    Raises:
        ServiceError: the records do not fit the model, or the service is being shut down.
    """
    found = []
    try:
        for one in predictor(table, _BATCH):
            if line.closing.is_set():
                raise shutting_down()
            found.append(one)
    except ConfideError as error:
        raise bad_request(str(error)) from None
    return found
