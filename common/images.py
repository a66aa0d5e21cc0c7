"""Images as cells of a table: a path, the bytes of a file, or an array of pixels."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.errors import DataError

_BYTES = "data:image;base64,"


def image_text(value: object, folder: Path) -> str:
    """The string that stands for an image in a table: an absolute path, or its bytes.

    `value` is a path (relative to `folder`, where the data file lies), what `datasets` writes (an object with
    `bytes` or `path`), or an array of 0 to 255: rows of numbers, or rows of red, green and blue.

    Raises:
        DataError: what is wrong with it, without saying where.
    """
    match value:
        case str() if value.strip():
            path = folder / value.strip()
            if not _is_file(path):
                raise DataError(
                    f"expected the path of an image, found {len(value):,} characters at which no file is"
                )
            return str(path.resolve())
        case {"bytes": bytes() as content} if content:
            return _BYTES + base64.b64encode(content).decode()
        case {"path": str() as inside}:
            return image_text(inside, folder)
        case list():
            try:
                pixels = np.array(value, dtype=np.float64)
            except (ValueError, TypeError):
                raise DataError("expected rows of equal length in an array of pixels") from None
            if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3) or not pixels.size:
                raise DataError(
                    f"expected an array (height, width) or (height, width, 3), found shape {pixels.shape}"
                )
            if not ((pixels >= 0) & (pixels <= 255)).all():
                raise DataError("expected pixels from 0 to 255")
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
            return _BYTES + base64.b64encode(buffer.getvalue()).decode()
    raise DataError("expected the path of an image, its bytes, or an array of pixels")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no path at all, such as a long text; the error's message would show it
        return False


def open_image(text: str) -> Image.Image:
    """The image that `image_text` wrote, in red, green and blue.

    Raises:
        DataError: it cannot be read.
    """
    try:
        source = io.BytesIO(base64.b64decode(text[len(_BYTES) :])) if text.startswith(_BYTES) else Path(text)
        with Image.open(source) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # A SyntaxError is PIL's of a PNG, with bytes of the file in its message.
        raise DataError(f"an image that cannot be read ({type(error).__name__})") from None
