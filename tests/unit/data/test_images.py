"""User pictures: every mode becomes RGB, everything else a message."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperbagel.core.errors import InputError
from hyperbagel.data.images import as_picture, captioned_grid, open_image, read_settings, save_png, to_rgb


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(data: bytes) -> tuple[int, ...]:
    image = open_image(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))  # type: ignore[return-value]


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!!", b"Exif\0\0II", b"MM"])
def test_a_picture_with_exif_data_that_nobody_can_read_is_a_picture(exif: bytes) -> None:
    data = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), exif=exif)
    assert pixel(data) == (1, 2, 3)
    assert as_picture(Image.open(io.BytesIO(data))).getpixel((0, 0)) == (1, 2, 3)


def test_a_cut_picture_that_was_opened_but_not_read_is_named() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="damaged picture"):
        as_picture(Image.open(io.BytesIO(encoded(noise, "JPEG")[:900])))


def test_modes() -> None:
    assert pixel(encoded(Image.new("RGB", (4, 4), (1, 2, 3)))) == (1, 2, 3)
    assert pixel(encoded(Image.new("L", (4, 4), 7))) == (7, 7, 7)
    assert pixel(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 0)))) == (255, 255, 255)  # transparent shows white
    assert pixel(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 255)))) == (200, 0, 0)
    assert pixel(encoded(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)
    red, green, blue = pixel(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"))
    assert red > 200 and green < 60 and blue < 60


def test_palette_with_transparency() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([9, 9, 9] * 256)
    assert pixel(encoded(image)) == (9, 9, 9)
    assert pixel(encoded(image, transparency=0)) == (255, 255, 255)


def test_sixteen_bits() -> None:
    values = np.full((4, 4), 40_000, np.uint16)
    assert pixel(encoded(Image.fromarray(values))) == (155, 155, 155)  # 40000 / 65535 * 255
    dark = np.full((4, 4), 200, np.uint16)
    assert pixel(encoded(Image.fromarray(dark))) == (0, 0, 0)


def test_first_frame_and_rotation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    assert pixel(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert open_image(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (4, 8)


def bomb() -> bytes:
    """A PNG that claims 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty file"),
        (b"hello, I am no picture", "no picture"),
        (encoded(Image.effect_noise((64, 64), 50))[:600], "damaged"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:300], "damaged"),
        (encoded(Image.new("RGB", (8, 8)))[:20], "picture"),
        (bomb(), "megapixels"),
        (encoded(Image.new("RGB", (8, 8)), "EPS"), "no picture, expected PNG, JPEG"),
    ],
)
def test_refusals_are_one_line(data: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        open_image(data, "cat.png")
    assert str(caught.value).startswith("cat.png: got") and "\n" not in str(caught.value)


def test_reading_leaves_the_filters_of_warnings_alone() -> None:
    """They are the process's: threads that set and take them back at once leave some behind."""
    before, large = list(warnings.filters), encoded(Image.new("RGB", (900, 900)))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_image, [large] * 24))
    assert warnings.filters == before


def test_settings_of_a_bomb(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb())
    with pytest.raises(InputError, match="no readable picture"):
        read_settings(tmp_path / "bomb.png")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(InputError, match="no readable file"):
            open_image(path)


def test_settings_round_trip(tmp_path: Path) -> None:
    settings = {"prompt": "ein rötes Auto\n", "seed": 0, "steps": 50}
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    save_png(image, tmp_path / "a.png", settings)
    assert read_settings(tmp_path / "a.png") == settings
    assert open_image(tmp_path / "a.png").tobytes() == image.tobytes()
    save_png(image, tmp_path / "b.png")
    with pytest.raises(InputError, match="without settings"):
        read_settings(tmp_path / "b.png")
    with pytest.raises(InputError):
        read_settings(tmp_path / "missing.png")
    with pytest.raises(InputError):
        save_png(image, tmp_path / "no" / "folder.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_sheet_shows_every_picture_and_text() -> None:
    red, plain = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (250, 250, 250))
    sheet = np.asarray(captioned_grid([(red, "a red thing"), (red, ""), (plain, "word " * 40)], columns=2, side=64, lines=2))
    assert (sheet == (255, 0, 0)).all(-1).sum() == 2 * 64 * 64
    assert (sheet.sum(-1) < 200).any()  # ink of the captions


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "I;16", "F"])
def test_pictures_in_memory_are_read_as_their_files_are(mode: str) -> None:
    image = as_picture(Image.new(mode, (5, 3)))
    assert image.mode == "RGB" and image.size == (5, 3)


def test_pictures_in_memory_that_need_nothing_stay_and_rotated_ones_are_turned(tmp_path: Path) -> None:
    plain, turned = Image.new("RGB", (5, 3)), Image.new("RGB", (5, 3))
    turned.getexif()[0x0112] = 6  # EXIF orientation: a quarter turn
    plain.save(tmp_path / "a.png")
    assert as_picture(plain) is plain and as_picture(turned).size == (3, 5)
    assert as_picture(tmp_path / "a.png").size == as_picture(str(tmp_path / "a.png")).size == (5, 3)


@pytest.mark.parametrize(
    ("given", "words"), [(Image.new("RGB", (0, 5)), "0x5 pixels"), (3, "got a int"), ("no-such.png", "no readable file")]
)
def test_what_is_no_picture_is_refused(given: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        as_picture(given)


@pytest.mark.parametrize(("values", "shown"), [([0.0, 0.5, 1.0], [0, 127, 255]), ([0.0, 100.0, 300.0], [0, 100, 255])])
def test_numbers_up_to_one_and_up_to_255_are_both_whole_ranges(values: list[float], shown: list[int]) -> None:
    assert np.asarray(to_rgb(Image.fromarray(np.array([values], np.float32))))[0, :, 0].tolist() == shown


@pytest.mark.parametrize(("cells", "rows"), [(1, 1), (3, 1), (4, 2), (6, 2)])
def test_a_sheet_has_as_many_rows_as_it_needs(cells: int, rows: int) -> None:
    sheet = captioned_grid([(Image.new("RGB", (4, 4)), "x")] * cells, 3, side=40, lines=1)
    assert sheet.size == (3 * 48 + 8, rows * (40 + 13 + 8) + 8)
