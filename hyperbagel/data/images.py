"""Reading pictures that users give, and writing pictures that carry their settings."""

from __future__ import annotations

import io
import json
import struct
import textwrap
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_write_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # told by their first bytes; others may need more than Pillow (EPS: Ghostscript)
MAX_PIXELS = 100_000_000  # of a picture that is read; a decompression bomb claims more
SETTINGS_KEY = "hyperbagel"
# What Pillow warns of (sizes, odd metadata) is refused here or does no harm. Set once and for all: setting and resetting a filter around
# each file is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\b")
# what Pillow raises for files that are truncated or inconsistent
_DAMAGED = (
    OSError, MemoryError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, TypeError, KeyError, OverflowError,
)  # fmt: skip


def open_image(source: Path | str | bytes, name: str | None = None) -> Image.Image:
    """A picture as RGB: EXIF rotation applied, alpha on white, first frame of an animation, 16 bits reduced to 8.

    Args:
        source: a path, or the bytes of a file.
        name: what error messages call it; None: the path.
    Raises:
        InputError: missing, not a picture, truncated, of zero size, or above `MAX_PIXELS`.
    """
    return _open(source, name, to_rgb)


def open_mask(source: Path | str | bytes, name: str | None = None) -> Image.Image:
    """The mask of an edit, mode "L": 255 where the picture may change. Arguments and errors as of `open_image`.

    In a file with transparency, what is transparent may change (OpenAI's rule); in one without, what is white.
    """
    return _open(source, name, _editable)


def as_mask(given: object) -> Image.Image:
    """What a caller gives as a mask, in mode "L": a path is opened, a PIL image converted by the rule of `open_mask`. Raises InputError as
    `as_picture` does."""
    if isinstance(given, (str, Path)):
        return open_mask(given)
    image = _in_memory(given)
    return image if image.mode == "L" else _editable(image)


def _editable(image: Image.Image) -> Image.Image:
    return ImageChops.invert(image.convert("RGBA").getchannel("A")) if has_alpha(image) else to_rgb(image).convert("L")


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _open(source: Path | str | bytes, name: str | None, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The first frame, turned upright and converted. Errors: see `open_image`."""
    label = name or (str(source) if not isinstance(source, bytes) else "picture")
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{label}: got no readable file ({reason}), expected a picture, check the path") from error
    if not data:
        raise InputError(f"{label}: got an empty file, expected a picture, give another one")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width < 1 or image.height < 1 or image.width * image.height > MAX_PIXELS:
            raise InputError(
                f"{label}: got {image.width}x{image.height} pixels, expected 1x1 to {MAX_PIXELS // 10**6} megapixels, "
                "give a picture of another size"
            )
        image.seek(0)
        image.load()
        return convert(_upright(image))
    except UnidentifiedImageError as error:
        raise InputError(f"{label}: got a file that is no picture, expected PNG, JPEG, WebP or the like, give another one") from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{label}: got more pixels than {MAX_PIXELS // 10**6} megapixels, expected fewer, give a smaller picture"
        ) from error
    except InputError:
        raise
    except _DAMAGED as error:
        raise InputError(f"{label}: got a damaged picture ({error}), expected a whole file, save or download it again") from error


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data say; unreadable data are ignored."""
    try:
        return image if image.getexif().get(ExifTags.Base.Orientation, 1) == 1 else ImageOps.exif_transpose(image)
    except _DAMAGED:
        return image


def as_picture(given: object) -> Image.Image:
    """What a caller gives as a picture, in RGB: a path is opened, a PIL image turned upright and converted as `open_image` does.

    Raises InputError for anything else, a damaged picture, or one without pixels.
    """
    if isinstance(given, (str, Path)):
        return open_image(given)
    image = _in_memory(given)
    return image if image.mode == "RGB" else to_rgb(image)


def _in_memory(given: object) -> Image.Image:
    """A PIL image that a caller gives: loaded, upright, in its own mode."""
    if not isinstance(given, Image.Image):
        raise InputError(f"got a {type(given).__name__} as a picture, expected a PIL image or a path, open it first")
    if given.width < 1 or given.height < 1:
        raise InputError(f"got a picture of {given.width}x{given.height} pixels, expected at least 1x1, give another one")
    try:
        given.load()  # its file may be open but not read yet
    except _DAMAGED as error:
        raise InputError(f"got a damaged picture ({error}), expected a whole file, save or download it again") from error
    return _upright(given)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB. Transparent parts become white, as in the reference."""
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits, one channel
        values = np.asarray(image).astype(np.float64)
        whole = not image.mode.startswith("F")
        top = 65535.0 if whole else 255.0 if values.max(initial=0) > 1 else 1.0
        return Image.fromarray((values.clip(0, top) * (255.0 / top)).astype(np.uint8), "L").convert("RGB")
    if has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def save_png(image: Image.Image, path: Path | str, settings: dict[str, Any] | None = None) -> None:
    """Write a PNG atomically, with `settings` as JSON in a text chunk. Raises InputError if the file cannot be written."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt(SETTINGS_KEY, json.dumps(settings, ensure_ascii=False, sort_keys=True))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    atomic_write_bytes(path, buffer.getvalue())


def read_settings(path: Path | str) -> dict[str, Any]:
    """What `save_png` stored. Raises InputError for a picture without settings."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            text = image.info.get(SETTINGS_KEY)
        settings = json.loads(text) if text else None
    except (*_DAMAGED, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: got no readable picture ({error}), expected a PNG written by this program, check the path") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: got a picture without settings, expected a PNG written by this program, give that one")
    return settings


def captioned_grid(cells: Sequence[tuple[Image.Image, str]], columns: int, side: int = 128, lines: int = 4) -> Image.Image:
    """A sheet of (picture, caption) cells: each picture scaled to `side` pixels, with up to `lines` lines of text below it."""
    font = ImageFont.load_default(11)
    line, gap = 13, 8
    height = side + lines * line + gap
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * height + gap), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(cells):
        x, y = gap + i % columns * (side + gap), gap + i // columns * height
        sheet.paste(to_rgb(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        wrapped = [piece for part in text.splitlines() for piece in textwrap.wrap(part, max(8, side // 6))]
        draw.multiline_text((x, y + side + 2), "\n".join(wrapped[:lines]), fill=(0, 0, 0), font=font, spacing=2)
    return sheet
