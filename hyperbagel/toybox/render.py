"""Draws a scene: a pure function of (scene, resolution).

Vector parts are drawn with Pillow at four times the resolution and averaged down, which smooths the edges.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hyperbagel.core.errors import InputError
from hyperbagel.toybox.scene import Scene, Thing
from hyperbagel.toybox.shapes import SHAPES, Part, bounds
from hyperbagel.toybox.vocabulary import BACKGROUNDS, COLOURS, RGB

OVERSAMPLE = 4
LINE = 0.016  # width of the outline, share of the picture
SHARP = 12  # parts with at most this many points have corners
INK: RGB = (36, 34, 42)
LIGHT: RGB = (246, 240, 222)


def _scale(colour: RGB, factor: float) -> RGB:
    r, g, b = colour
    return round(r * factor), round(g * factor), round(b * factor)


def _tone(colour: RGB, tone: str) -> RGB:
    """A colour under a tone, which is a linear map: "dark" leans to blue, "faded" goes nearly halfway to a light grey."""
    r, g, b = colour
    if tone == "dark":
        return round(r * 0.5), round(g * 0.5), round(b * 0.6)
    if tone == "faded":
        return tuple(round(0.55 * v + 0.45 * 228) for v in (r, g, b))  # type: ignore[return-value]
    return colour


def _line_px(scene_px: int) -> int:
    return max(2, round(LINE * scene_px))


def _frame(thing: Thing, px: int, line: float) -> tuple[float, float, float]:
    """(centre x, centre y, half side) in pixels of a canvas of `px`; the outline stays inside the bounding square."""
    return thing.cx * px, thing.cy * px, (thing.extent * px - line) / 2


def _stripe(canvas: Image.Image, points: list[tuple[float, float]], colour: RGB) -> None:
    """Diagonal bands inside one polygon."""
    px = canvas.width
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, top = math.floor(min(xs)), math.floor(min(ys))
    width, height = math.ceil(max(xs)) - left + 1, math.ceil(max(ys)) - top + 1
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in points], fill=255)
    bands = Image.new("L", (width, height))
    draw = ImageDraw.Draw(bands)
    step, thick = 0.075 * px, round(0.034 * px)
    for i in range(math.floor((left + top) / step), math.ceil((left + top + width + height) / step) + 1):
        offset = i * step - left - top  # bands are fixed to the picture, x + y = i * step, so that they continue from part to part
        draw.line([(offset - height - width, height + width), (offset + height + width, -height - width)], fill=255, width=thick)
    canvas.paste(colour, (left, top), Image.composite(bands, Image.new("L", bands.size), mask))


def _draw_part(canvas: Image.Image, draw: ImageDraw.ImageDraw, part: Part, thing: Thing, scene: Scene, line: int) -> None:
    own, back = COLOURS[thing.colour], BACKGROUNDS[scene.background]
    roles = {"fill": own, "shade": _scale(own, 0.72), "light": LIGHT, "dark": INK, "hole": back}
    fill, edge = _tone(roles[part.role], scene.tone), _tone(INK, scene.tone)
    if scene.style == "outline":  # a line drawing: every line in the thing's colour, nothing filled
        fill, edge, line = _tone(back, scene.tone), _tone(own, scene.tone), round(1.8 * line)
    cx, cy, half = _frame(thing, canvas.width, line)
    points = [(cx + x * half, cy + y * half) for x, y in part.points]
    if part.stroke:
        width = max(2, round(part.stroke * half))
        if part.role != "dark":
            draw.line(points, fill=edge, width=width + 2 * line, joint="curve")
            draw.line(points, fill=fill, width=width, joint="curve")
        else:
            draw.line(points, fill=edge, width=width, joint="curve")
        return
    draw.polygon(points, fill=fill)
    if thing.material == "striped" and part.role in ("fill", "shade") and scene.style == "plain":
        _stripe(canvas, points, _scale(fill, 0.4))
    elif thing.material == "striped" and part.role == "fill":
        _stripe(canvas, points, edge)
    joint = "curve" if len(points) <= SHARP else None  # many short pieces leave no gaps, and drawing joints takes most of the time
    draw.line([*points, points[0], points[1]], fill=edge, width=line, joint=joint)


def render(scene: Scene, resolution: int = 64) -> NDArray[np.uint8]:
    """The picture of a scene: uint8 [resolution, resolution, 3].

    Raises InputError for a resolution below 16 or above 4096.
    """
    if not 16 <= resolution <= 4096:
        raise InputError(f"got resolution {resolution}, expected 16 to 4096; choose one in between")
    px = resolution * OVERSAMPLE
    canvas = Image.new("RGB", (px, px), _tone(BACKGROUNDS[scene.background], scene.tone))
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        for part in SHAPES[thing.noun]:
            _draw_part(canvas, draw, part, thing, scene, _line_px(px))
    return np.asarray(canvas.reduce(OVERSAMPLE))


def object_box(thing: Thing, resolution: int = 64) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) in pixels: the tight box of a drawn thing, outline included (style "plain")."""
    line = _line_px(resolution * OVERSAMPLE) / OVERSAMPLE
    cx, cy, half = _frame(thing, resolution, line)
    x0, y0, x1, y1 = bounds(thing.noun)
    return cx + x0 * half - line / 2, cy + y0 * half - line / 2, cx + x1 * half + line / 2, cy + y1 * half + line / 2
