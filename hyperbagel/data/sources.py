"""BAGEL's file formats as sources: T2I parquet, edit parquet (both, ours, with plans), and jsonl of conversations about pictures.

Rows come in a new random order in each pass. Parquet is shuffled by row group and then within it, so each row group is read once per pass.
"""

from __future__ import annotations

import bisect
import itertools
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hyperbagel.core.errors import InputError
from hyperbagel.data.images import open_image
from hyperbagel.data.loader import BrokenRow
from hyperbagel.data.plan import Sample, Text, VitImage, picture_items
from hyperbagel.data.prompts import planned
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.transforms import ImageTransform, InTurn

IMAGE_TAG = "<image>"
HUMANS, MODELS = ("human", "user"), ("gpt", "assistant")


@dataclass(frozen=True)
class Reading:
    """What it takes to turn rows into plans."""

    tokenizer: Tokenizer
    vae: ImageTransform
    vit: ImageTransform | InTurn
    seed: int
    noise_copies: int = 1

    def text(self, text: str, *, loss: bool = False) -> Text:
        return Text(self.tokenizer.encode(text), loss=loss)

    def picture(self, image: Image.Image, *, loss: bool, context: bool) -> Sample:
        vit = self.vit.pixels(image) if context else None
        return picture_items(self.vae.pixels(image), vit, loss=loss, copies=self.noise_copies, context=context)


class FileSource(ABC):
    """Rows in blocks (row groups, or a whole jsonl file) behind random access by sample index."""

    def __init__(self, reading: Reading, blocks: Sequence[int], path: Path) -> None:
        self.reading, self.path = reading, path
        self.ends = list(itertools.accumulate(blocks))
        self.blocks = tuple(blocks)
        if not self.ends or not self.ends[-1]:
            raise InputError(f"{path}: got files without a single row, expected data, check the path")

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """(block, row in the block) of sample `index`."""
        epoch, at = divmod(index, len(self))
        order, ends = _block_order(self.blocks, f"{self.reading.seed}/{epoch}")
        place = bisect.bisect_right(ends, at)
        block = order[place]
        rows = _permutation(self.blocks[block], f"{self.reading.seed}/{epoch}/{block}")
        return block, rows[at - (ends[place] - self.blocks[block])]

    def sample(self, index: int) -> Sample:
        """The plan of sample `index`. Raises BrokenRow, naming file and row, if anything in the row cannot be used."""
        block, row = self.locate(index)
        try:
            return self.plan(self.row(block, row), random.Random(f"{self.reading.seed}/{index}"))
        except (InputError, KeyError, TypeError, ValueError, IndexError, AttributeError, OSError, RecursionError) as error:
            what = f"missing {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            raise BrokenRow(f"{self.where(block, row)}: {what}") from error

    @abstractmethod
    def row(self, block: int, row: int) -> dict[str, Any]:
        """One raw row."""

    @abstractmethod
    def where(self, block: int, row: int) -> str:
        """The name of a row in messages."""

    @abstractmethod
    def plan(self, row: dict[str, Any], rng: random.Random) -> Sample:
        """The row's plan. Raises KeyError, TypeError, ValueError or InputError."""


@lru_cache(maxsize=16)
def _permutation(n: int, seed: str) -> list[int]:
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


@lru_cache(maxsize=16)
def _block_order(blocks: tuple[int, ...], seed: str) -> tuple[list[int], list[int]]:
    """(the blocks in the order of one pass, their cumulative ends)."""
    order = _permutation(len(blocks), seed)
    return order, list(itertools.accumulate(blocks[b] for b in order))


class ParquetSource(FileSource):
    """Base of the two parquet formats. path: a file, or a folder that is searched for *.parquet. think_share: the share of samples in think
    mode, whose plans are in one more column."""

    columns: tuple[str, ...]
    plans: str  # ours: the column of plans

    def __init__(self, path: Path, reading: Reading, think_share: float = 0.0) -> None:
        self.think_share = think_share
        if think_share:
            self.columns = (*self.columns, self.plans)
        self.groups: list[tuple[Path, int]] = []
        blocks: list[int] = []
        for file in find_files(path, ".parquet"):
            try:
                data = pq.ParquetFile(file)
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{file}: got no readable parquet file ({error}), expected one, replace or remove it") from error
            with data:
                missing = [c for c in self.columns if c not in data.schema_arrow.names]
                if missing:
                    raise InputError(
                        f"{file}: got columns {', '.join(data.schema_arrow.names)}, expected {', '.join(self.columns)}, "
                        "rename them or check the kind of the source"
                    )
                for group in range(data.num_row_groups):
                    self.groups.append((file, group))
                    blocks.append(data.metadata.row_group(group).num_rows)
        super().__init__(reading, blocks, path)

    def thinks(self, rng: random.Random) -> bool:
        """Whether a sample is in think mode; draws nothing where none is."""
        return self.think_share > 0 and rng.random() < self.think_share

    def row(self, block: int, row: int) -> dict[str, Any]:
        return _row_group(*self.groups[block], self.columns).slice(row, 1).to_pylist()[0]

    def where(self, block: int, row: int) -> str:
        file, group = self.groups[block]
        return f"{file} row group {group} row {row}"


@lru_cache(maxsize=8)
def _row_group(file: Path, group: int, columns: tuple[str, ...]) -> pa.Table:
    try:
        with pq.ParquetFile(file) as data:
            return data.read_row_group(group, columns=list(columns))
    except pa.ArrowException as error:
        raise ValueError(f"unreadable row group ({error})") from error


class T2ISource(ParquetSource):
    """{image: bytes, captions}: captions is a mapping or list of texts, as JSON (as BAGEL has it) or itself; one of them is drawn. plans,
    likewise, are by the same names or places."""

    columns, plans = ("image", "captions"), "plans"

    def plan(self, row: dict[str, Any], rng: random.Random) -> Sample:
        texts, plans = _texts(row["captions"], "captions"), dict[Any, str]()
        if not texts:
            raise ValueError("no caption")
        if self.thinks(rng):
            plans = _texts(row["plans"], "plans")
            texts = {name: text for name, text in texts.items() if name in plans}
            if not texts:
                raise ValueError("no plan by the name or place of a caption")
        name = rng.choice(list(texts))
        first, prompt = planned(self.reading.tokenizer, texts[name], plans.get(name))
        return [*first, *prompt, *self.reading.picture(open_image(_bytes(row["image"])), loss=True, context=False)]


class EditSource(ParquetSource):
    """{image_list: [bytes], instruction_list}: instruction i leads from picture i to i + 1; it is a text or a list of paraphrases.
    plan_list: plan i is that of instruction i, or null.

    One or two successive edits are drawn from a longer chain. With two, either each picture is a target in turn, or both instructions
    together lead to the last one. In think mode it is one edit, of those with a plan.
    """

    columns, plans = ("image_list", "instruction_list"), "plan_list"

    def plan(self, row: dict[str, Any], rng: random.Random) -> Sample:
        pictures, instructions = (_list(row, name) for name in self.columns[:2])
        if len(pictures) < 2 or len(instructions) < len(pictures) - 1:
            raise ValueError(f"{len(pictures)} pictures and {len(instructions)} instructions")
        plan = None
        if self.thinks(rng):
            plans = {i: text for i, text in _texts(_list(row, "plan_list"), "plan_list").items() if i < len(pictures) - 1}
            if not plans:
                raise ValueError("no plan")
            first, plan = rng.choice(list(plans.items()))
            last = first + 1
        else:
            first = rng.randrange(len(pictures) - 1)
            last = rng.randrange(first + 1, min(first + 3, len(pictures)))
        texts = [rng.choice(t) if isinstance(t, list) else t for t in instructions[first:last]]
        if not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError("an empty instruction")
        images = [open_image(_bytes(p)) for p in pictures[first : last + 1]]
        context = self.reading.picture(images[0], loss=False, context=True)
        if last - first > 1 and rng.random() < 0.5:
            texts, images = ["; ".join(t.strip().rstrip(".;") for t in texts)], [images[0], images[-1]]
        system, prompt = planned(self.reading.tokenizer, texts[0], plan)
        sample = [*system, *context, *prompt]
        for i, image in enumerate(images[1:]):
            if i:
                sample += planned(self.reading.tokenizer, texts[i], None)[1]
            sample += self.reading.picture(image, loss=True, context=i < len(texts) - 1)
        return sample


class ChatSource(FileSource):
    """jsonl of {image: path or list of paths, conversations: [{from, value}]}; <image> in a value marks where a picture goes.

    path: a .jsonl file or a folder of them. images: the folder that picture paths are relative to.
    """

    def __init__(self, path: Path, images: Path, reading: Reading) -> None:
        self.images = images
        self.files = find_files(path, ".jsonl")
        self.offsets = [_line_offsets(file) for file in self.files]
        super().__init__(reading, [len(o) for o in self.offsets], path)

    def row(self, block: int, row: int) -> dict[str, Any]:
        with open(self.files[block], "rb") as file:
            file.seek(self.offsets[block][row])
            return json.loads(file.readline())

    def where(self, block: int, row: int) -> str:
        return f"{self.files[block]} row {row + 1}"

    def plan(self, row: dict[str, Any], rng: random.Random) -> Sample:
        names = row.get("image") or []
        names = [names] if isinstance(names, str) else names
        turns = row["conversations"]
        tags = sum(turn["value"].count(IMAGE_TAG) for turn in turns)
        if tags not in (0, len(names)):
            raise ValueError(f"{len(names)} pictures but {tags} {IMAGE_TAG} marks")
        pictures = [VitImage(self.reading.vit.pixels(open_image(self.images / name), len(names))) for name in names]
        sample: Sample = [] if tags else list(pictures)  # without marks the pictures come first
        waiting = iter(pictures)
        for turn in turns:
            if turn["from"] not in HUMANS + MODELS:
                raise ValueError(f"a turn from {turn['from']!r}, expected one of {', '.join(HUMANS + MODELS)}")
            for i, piece in enumerate(turn["value"].split(IMAGE_TAG)):
                if i:
                    sample.append(next(waiting))
                if piece.strip():
                    sample.append(self.reading.text(piece.strip(), loss=turn["from"] in MODELS))
        if not any(isinstance(item, Text) and item.loss for item in sample):
            raise ValueError("no answer to learn")
        return sample


def find_files(path: Path, suffix: str) -> list[Path]:
    """`path` itself, or all files below it that end in `suffix`, sorted. Raises InputError if there are none."""
    files = [path] if path.is_file() else sorted(path.rglob(f"*{suffix}")) if path.is_dir() else []
    if not files:
        got = "a folder without such files" if path.is_dir() else "nothing there"
        raise InputError(f"{path}: got {got}, expected a {suffix} file or a folder of them, check the path")
    return files


def _line_offsets(path: Path) -> list[int]:
    """The byte offset of each line that is not empty."""
    offsets, at = [], 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                offsets.append(at)
            at += len(line)
    return offsets


def _list(row: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(value := row[name], list):  # a text would pass for one: it has a length and elements
        raise ValueError(f"{name} is a {type(value).__name__}, expected a list")
    return value


def _texts(value: Any, name: str) -> dict[Any, str]:
    """A mapping or list, as JSON or itself -> its texts by name or place, without empty ones and what is no text."""
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{name} are no JSON ({error}), expected an object or list of texts") from error
    if not isinstance(value, dict | list):
        raise ValueError(f"{name} are a {type(value).__name__}, expected a JSON object or list of texts")
    named = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: text for key, text in named if isinstance(text, str) and text.strip()}


def _bytes(value: Any) -> bytes:
    """An encoded picture: raw bytes, or the {bytes, path} of the datasets library."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError(f"a picture as {type(value).__name__}, expected bytes")
    return data
