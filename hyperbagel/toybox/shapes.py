"""The drawings: each noun as a few parts in a square from -1 to 1 (x to the right, y down).

A part is a polygon (points) or an open stroke, with a role that the renderer turns into a colour:
"fill" the thing's own colour, "shade" a darker one of it, "light" and "dark" fixed details, "hole" the background.
"""

from __future__ import annotations

import math
from typing import NamedTuple

Point = tuple[float, float]


class Part(NamedTuple):
    role: str
    points: tuple[Point, ...]
    stroke: float = 0.0  # width of an open line in units of the square; 0: a closed polygon


def _oval(cx: float, cy: float, rx: float, ry: float, role: str = "fill", start: float = 0.0, stop: float = 360.0) -> Part:
    """An ellipse, or the piece of it between two angles (degrees, clockwise from the right), closed by a chord."""
    steps = max(6, round(28 * abs(stop - start) / 360))
    angles = [math.radians(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return Part(role, tuple((cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles))


def _poly(*points: Point, role: str = "fill") -> Part:
    return Part(role, points)


def _box(x0: float, y0: float, x1: float, y1: float, role: str = "fill") -> Part:
    return Part(role, ((x0, y0), (x1, y0), (x1, y1), (x0, y1)))


def _star() -> Part:
    radii = (1.05, 0.44)
    return _poly(*((radii[i % 2] * math.sin(i * math.pi / 5), 0.08 - radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)))


def _heart() -> Part:
    def point(a: float) -> Point:
        x = 16 * math.sin(a) ** 3
        y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        return x / 16, -(y + 2.5) / 15

    return _poly(*(point(i * 2 * math.pi / 36) for i in range(36)))


def _moon() -> Part:
    outer = [(0.1 + math.cos(a), math.sin(a)) for a in (math.radians(55 + i * 250 / 20) for i in range(21))]
    inner = [(0.62 + 0.82 * math.cos(a), 0.82 * math.sin(a)) for a in (math.radians(272 - i * 184 / 16) for i in range(17))]
    return _poly(*outer, *inner)


def _umbrella() -> Part:
    dome = [(math.cos(a), 0.1 + 1.0 * math.sin(a)) for a in (math.radians(180 + i * 180 / 16) for i in range(17))]
    scallops = [
        (cx + 0.333 * math.cos(a), 0.1 - 0.22 * math.sin(a))
        for cx in (0.667, 0.0, -0.667)
        for a in (math.radians(i * 180 / 6) for i in range(7))
    ]
    return _poly(*dome, *scallops)


_PETALS = tuple(_oval(0.62 * math.sin(a), -0.62 * math.cos(a), 0.38, 0.38) for a in (i * 2 * math.pi / 6 for i in range(6)))

SHAPES: dict[str, tuple[Part, ...]] = {
    "circle": (_oval(0, 0, 0.95, 0.95),),
    "square": (_box(-0.88, -0.88, 0.88, 0.88),),
    "triangle": (_poly((0, -0.95), (1, 0.82), (-1, 0.82)),),
    "star": (_star(),),
    "heart": (_heart(),),
    "diamond": (_poly((0, -1), (0.72, 0), (0, 1), (-0.72, 0)),),
    "cross": (
        _poly(
            (-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34),
            (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34),
        ),
    ),
    "ring": (_oval(0, 0, 1, 1), _oval(0, 0, 0.45, 0.45, "hole")),
    "moon": (_moon(),),
    "house": (
        _box(-0.72, -0.1, 0.72, 1),
        _poly((0, -1), (1, -0.05), (-1, -0.05), role="shade"),
        _box(-0.22, 0.35, 0.22, 1, "light"),
    ),
    "tree": (
        _box(-0.16, 0.55, 0.16, 1, "shade"),
        _poly((0, -0.2), (0.88, 0.66), (-0.88, 0.66)),
        _poly((0, -0.62), (0.7, 0.2), (-0.7, 0.2)),
        _poly((0, -1), (0.5, -0.3), (-0.5, -0.3)),
    ),
    "car": (
        _poly((-0.55, -0.02), (-0.38, -0.58), (0.3, -0.58), (0.55, -0.02), role="light"),
        _poly((-1, 0.42), (-1, 0.02), (-0.6, -0.1), (0.62, -0.1), (1, 0.06), (1, 0.42)),
        _oval(-0.52, 0.42, 0.27, 0.27, "dark"),
        _oval(0.52, 0.42, 0.27, 0.27, "dark"),
    ),
    "fish": (
        _poly((0.3, 0), (1, -0.6), (1, 0.6), role="shade"),
        _oval(-0.22, 0, 0.78, 0.52),
        _oval(-0.56, -0.12, 0.12, 0.12, "dark"),
    ),
    "flower": (*_PETALS, _oval(0, 0, 0.36, 0.36, "dark")),
    "cup": (
        Part("fill", ((0.3, -0.42), (0.86, -0.42), (0.86, 0.3), (0.2, 0.42)), 0.2),
        _poly((-0.92, -0.8), (0.46, -0.8), (0.3, 0.88), (-0.76, 0.88)),
        _oval(-0.23, -0.8, 0.69, 0.2, "light"),
    ),
    "boat": (
        _box(-0.1, -0.95, 0.06, 0.4, "dark"),
        _poly((0.06, -0.95), (0.9, 0.22), (0.06, 0.22), role="light"),
        _poly((-1, 0.32), (1, 0.32), (0.62, 0.95), (-0.62, 0.95)),
    ),
    "mushroom": (
        _poly((-0.28, 0), (0.28, 0), (0.4, 0.95), (-0.4, 0.95), role="light"),
        _oval(0, 0.12, 1, 1.05, start=180, stop=360),
        _oval(-0.38, -0.3, 0.17, 0.17, "light"),
        _oval(0.3, -0.45, 0.19, 0.19, "light"),
    ),
    "umbrella": (Part("dark", ((0, -0.2), (0, 0.76), (0.14, 0.92), (0.34, 0.86), (0.38, 0.64)), 0.14), _umbrella()),
    "key": (
        _poly((0, -0.22), (1, -0.22), (1, 0.66), (0.68, 0.66), (0.68, 0.22), (0.5, 0.22), (0.5, 0.5), (0.24, 0.5), (0.24, 0.22), (0, 0.22)),
        _oval(-0.42, 0, 0.58, 0.58),
        _oval(-0.42, 0, 0.2, 0.2, "hole"),
    ),
    "lamp": (
        _box(-0.14, 0.1, 0.14, 0.85, "shade"),
        _poly((-0.5, 0.8), (0.5, 0.8), (0.6, 1), (-0.6, 1), role="shade"),
        _poly((-0.42, -1), (0.42, -1), (0.9, 0.18), (-0.9, 0.18)),
    ),
}  # fmt: skip


def bounds(noun: str) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) of a drawing in units of its square, with open strokes but without the outline around it."""
    spread = [(x, y, part.stroke / 2) for part in SHAPES[noun] for x, y in part.points]
    return (
        min(x - s for x, _, s in spread),
        min(y - s for _, y, s in spread),
        max(x + s for x, _, s in spread),
        max(y + s for _, y, s in spread),
    )
