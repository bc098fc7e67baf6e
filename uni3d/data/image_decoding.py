"""One encoded picture to pixels, with limits: what a data set of small square images may hold, and no more.

Legend: C channels, H W pixels.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from uni3d.errors import UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_SIDE = 4096
MAX_FILE_BYTES = 64 * 2**20
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_PLAIN_MODES = {"L": 1, "RGB": 3}
_OPAQUE_MODES = ("L", "P", "1", "CMYK", "YCbCr")
# What Pillow raises for files that are cut off or altered.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)


def shown(name: str) -> str:
    """A file's name for a message of one line: quoted where it would break it, and cut if it is long."""
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= 200 else f"{name[:197]}..."


def decode_image(encoded: bytes, *, title: str, as_rgb: bool = False) -> np.ndarray:
    """Pixels uint8 [C, H, W] of a PNG, JPEG, WebP or BMP file; C is 1 (grey) or 3 (sRGB).

    `title` names the file in messages. With `as_rgb` grey, palette and CMYK pictures are read as sRGB.
    EXIF orientation is not applied and only the first frame is read. Raises UsageError for a damaged file,
    more than MAX_SIDE pixels a side (before they are decoded), transparency, and more than 8 bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
                _check_header(image, title, as_rgb)
                pixels = np.asarray(image.convert("RGB") if as_rgb else image)
    except UsageError:
        raise
    except Image.DecompressionBombError:
        raise UsageError(f"{title} claims more than {MAX_SIDE} pixels a side; shrink or remove it") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{title} cannot be decoded ({reason}); replace or remove it") from None
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)


def _check_header(image: Image.Image, title: str, as_rgb: bool) -> None:
    if max(image.size) > MAX_SIDE:
        raise UsageError(
            f"{title} has {image.size[0]}x{image.size[1]} pixels, more than {MAX_SIDE} a side; "
            f"shrink or remove it"
        )
    is_plain = image.mode in _PLAIN_MODES and "transparency" not in image.info
    is_opaque = image.mode in _OPAQUE_MODES and "transparency" not in image.info
    if is_plain or (as_rgb and is_opaque):
        return
    remedy = (
        "ask for RGB (--rgb, as_rgb=True)" if is_opaque else "convert it to 8-bit RGB without transparency"
    )
    raise UsageError(
        f"{title} has the Pillow mode {image.mode}, which is neither 8-bit grey nor 8-bit RGB; {remedy}"
    )
