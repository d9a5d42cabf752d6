"""Batches of several ranks: other samples, one position."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hyperbagel.core.config import check_config
from hyperbagel.data.mixture import RowsConfig
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.train.batches import Batches
from hyperbagel.train.distributed import World
from hyperbagel.train.stage import Draws

sys.path.insert(0, str(Path(__file__).parent / "stages"))
from tiny_base import CONFIG, SOURCES, TOKENIZER


@dataclass(frozen=True)
class Threads(World):
    """Two ranks in one process."""

    flags: list[bool] = field(default_factory=list)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))

    def all(self, flag: bool) -> bool:
        self.flags[self.rank] = flag
        self.barrier.wait(30)
        told = all(self.flags)
        self.barrier.wait(30)
        return told


def test_ranks_stand_at_the_same_group_whatever_their_samples_take() -> None:
    data = check_config(
        RowsConfig,
        {"sources": SOURCES | {"t2i": SOURCES["t2i"] | {"samples": 1, "styles": {"terse": 1, "full": 1}}}, "batch_tokens": 300,
         "mixture": [{"weights": {"t2i": 1, "edit": 1}}]},
        "test",
    )  # fmt: skip
    flags, barrier = [False, False], threading.Barrier(2)
    tokenizer, vae = Tokenizer.from_folder(TOKENIZER), AutoEncoder(CONFIG.vae)
    made = [
        Batches(data, CONFIG, tokenizer, vae, seed=3, device=torch.device("cpu"), shift=1.0, world=Threads(rank, 2, flags, barrier))
        for rank in range(2)
    ]
    positions: list[list[int]] = [[], []]
    lengths: list[list[int]] = [[], []]

    def run(rank: int) -> None:
        for step in range(6):
            batch = made[rank].next(Draws.at(0, step, rank))
            positions[rank].append(made[rank].state()["loader"]["group"])
            lengths[rank].append(int((batch.packed.sample_id >= 0).sum()))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(positions[0]) == 6 and positions[0] == positions[1]
    assert lengths[0] != lengths[1]  # they did read other samples
