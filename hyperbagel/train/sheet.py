"""Sample sheets: rows of pictures in one PNG file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from hyperbagel.core.files import atomic_write_bytes


def to_uint8(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] to whole 0..255, truncated as BAGEL does; any shape."""
    return (pictures.float() * 0.5 + 0.5).clamp(0, 1).mul(255).to(torch.uint8)


def write_sheet(path: Path, rows: list[Tensor], gap: int = 2) -> None:
    """One PNG: each row a batch [B, 3, H, W] in [-1, 1], all of one shape, `gap` white pixels between pictures."""
    n, _, h, w = rows[0].shape
    sheet = torch.full((len(rows) * (h + gap) + gap, n * (w + gap) + gap, 3), 255, dtype=torch.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(to_uint8(row.detach().cpu())):
            top, left = gap + i * (h + gap), gap + j * (w + gap)
            sheet[top : top + h, left : left + w] = picture.permute(1, 2, 0)
    atomic_write_bytes(path, encode_png(sheet))


def encode_png(picture: Tensor) -> bytes:
    """uint8 [H, W, 3] as an RGB PNG (no filter, one data chunk)."""
    h, w, _ = picture.shape
    # each line starts with its filter type, 0
    lines = torch.cat([torch.zeros(h, 1, dtype=torch.uint8), picture.reshape(h, w * 3)], dim=1)
    header = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.numpy().tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
