"""What a recipe says about its data (sources, mixture by phase, dropout, layout of rows), and the loader that it describes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hyperbagel.core.config import Config, changed, check_weights
from hyperbagel.core.errors import InputError
from hyperbagel.data.loader import Check, Checked, Loader, Phase, Prepare, Source
from hyperbagel.data.plan import Dropout
from hyperbagel.data.sources import ChatSource, EditSource, Reading, T2ISource
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.toybox_source import Task, ToyboxSource
from hyperbagel.data.transforms import ImageTransform, InTurn
from hyperbagel.toybox.language import CATEGORIES, EXTRA_GROUPS, GROUPS, KINDS, STYLES

log = logging.getLogger(__name__)

# Keys of SourceConfig that the toybox and file kinds share, and those that the file kinds read alone; all others are the toybox's.
_EVERY, _FILES = ("kind", "samples", "noise_copies", "think_share"), ("path", "images")


class SourceConfig(Config):
    """One source. Kind toybox needs a task; the file kinds need a path."""

    kind: Literal["toybox", "t2i", "edit", "chat"] = "toybox"
    samples: int = Field(default=1, ge=1)  # consecutive samples per group
    noise_copies: int = Field(default=1, ge=1)  # noise draws of a target in one sequence
    think_share: float = Field(default=0.0, ge=0, le=1)  # of samples in think mode; t2i and edit: with the plans of one more column
    # toybox
    task: Task | None = None
    resolution: int = Field(default=64, ge=16)
    styles: dict[str, float] | None = None  # t2i: weights of terse, medium and full captions; None: toybox.captions's own
    categories: dict[str, float] | None = None  # t2i: weights of what captions are about; None: toybox.captions's own
    groups: dict[str, float] | None = None  # edit: weights of the kinds of edits; None: toybox.edits's own
    turns: int = Field(default=1, ge=1)  # question: how many about one picture in one sequence
    split: Literal["train", "heldout"] = "train"
    kinds: dict[str, float] | None = None  # question: weights of the kinds of questions; None: toybox.questions's own
    plan_background: bool = True  # t2i: whether plans name the background
    near_misses: bool = False  # t2i and edit: each sample also has a picture that almost fits, for stage reward
    checks: int = Field(default=0, ge=0)  # t2i and edit: questions about the picture, with answers, for stage refl
    # files
    path: Path | None = None
    images: Path | None = None  # chat: the folder that picture paths are relative to; None: that of the jsonl

    @model_validator(mode="after")
    def _weights_draw(self) -> SourceConfig:
        check_weights(self.styles, STYLES, "styles")
        check_weights(self.categories, (*CATEGORIES, "many"), "categories")
        check_weights(self.groups, (*GROUPS, *EXTRA_GROUPS), "groups")
        check_weights(self.kinds, KINDS, "kinds")
        if self.kind == "toybox" and (idle := changed(self, _FILES)):
            raise ValueError(f"{idle[0]} is of files, and this source is the toybox; set kind to t2i, edit or chat, or leave {idle[0]} out")
        if self.kind == "chat" and self.think_share:
            raise ValueError(
                "think_share is of sources that draw, and this source is of kind chat, whose answers hold their thoughts; leave it out"
            )
        if self.kind != "toybox" and (idle := changed(self, toybox_keys())):
            raise ValueError(f"{idle[0]} is of the toybox, and this source is of kind {self.kind}; leave {idle[0]} out")
        return self


def toybox_keys() -> list[str]:
    """Keys that only a toybox source reads; ToyboxSource takes them by the same names."""
    return [name for name in SourceConfig.model_fields if name not in (*_EVERY, *_FILES)]


class PhaseConfig(Config):
    """Weights of the sources until a group number (None: to the end)."""

    until: int | None = Field(default=None, ge=1)
    weights: dict[str, float]


class DropoutConfig(Config):
    """Shares of items with enable_cfg that are dropped; defaults are BAGEL's."""

    text: float = Field(default=0.1, ge=0, le=1)
    vit: float = Field(default=0.3, ge=0, le=1)
    vae: float = Field(default=0.3, ge=0, le=1)

    def build(self) -> Dropout:
        return Dropout(self.text, self.vit, self.vae)


class DataConfig(Config):
    """The data of a training stage."""

    sources: dict[str, SourceConfig]
    mixture: list[PhaseConfig]
    workers: int = Field(default=0, ge=0)
    worker_kind: Literal["thread", "process"] = "thread"

    def single_sources(self) -> list[Self]:
        """One data configuration for each source, whatever the mixture: for held-out figures."""
        return [
            self.model_copy(update={"sources": {name: source}, "mixture": [PhaseConfig(weights={name: 1.0})], "workers": 0})
            for name, source in self.sources.items()
        ]


class RowsConfig(DataConfig):
    """The data of stage base, which lays samples out in rows. Other stages prefill contexts, and refuse these keys."""

    dropout: DropoutConfig = DropoutConfig()
    rows: Literal["one", "packed"] = "one"
    row_tokens: int = Field(default=0, ge=0)  # average length of a packed row
    batch_tokens: int = Field(default=0, ge=0)  # 0: a batch is one group; else groups are added until there are this many tokens
    sample_tokens: int = Field(default=0, ge=0)  # longer samples are skipped; 0: no limit
    pad_to: int = Field(default=1, ge=1)


def build_source(
    name: str, config: SourceConfig, tokenizer: Tokenizer, vae: ImageTransform, vit: ImageTransform | InTurn, seed: int
) -> Source:
    """The source that a recipe describes. Raises InputError for keys that do not fit its kind or are missing, or for files without data."""
    if config.kind == "toybox":
        if config.task is None:
            raise InputError(f"source {name!r}: got no task, expected t2i, edit or question, add task to the recipe")
        own: dict[str, Any] = {key: getattr(config, key) for key in ("noise_copies", "think_share", *toybox_keys())}
        return ToyboxSource(tokenizer=tokenizer, seed=seed, **own)
    if config.path is None:
        raise InputError(f"source {name!r}: got no path, expected files of kind {config.kind!r}, add path to the recipe")
    reading = Reading(tokenizer, vae, vit, seed, config.noise_copies)
    if config.kind == "chat":
        return ChatSource(config.path, config.images or (config.path if config.path.is_dir() else config.path.parent), reading)
    return (T2ISource if config.kind == "t2i" else EditSource)(config.path, reading, config.think_share)


def build_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    vae: ImageTransform,
    vit: ImageTransform | InTurn,
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    prepare: Prepare | None = None,
    check: Check | None = None,
) -> Loader:
    """The loader of a recipe's data. prepare: see Loader. check: called with each sample, raises BrokenRow for one that cannot be used."""
    sources = {name: build_source(name, source, tokenizer, vae, vit, seed) for name, source in config.sources.items()}
    for name in sources:
        if not any(phase.weights.get(name) for phase in config.mixture):
            log.warning("source %r has no weight in data.mixture, so nothing is read from it", name)
    return Loader(
        sources if check is None else {name: Checked(source, check) for name, source in sources.items()},
        [Phase(p.until, p.weights) for p in config.mixture],
        {name: source.samples for name, source in config.sources.items()},
        seed=seed,
        rank=rank,
        world=world,
        workers=config.workers,
        kind=config.worker_kind,
        prepare=prepare,
    )
