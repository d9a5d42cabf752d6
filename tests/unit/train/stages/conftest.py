"""A tiny base, a student of it and a reward over it, made once a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_base import HELD_OUT, QUICK, run, write_base

from hyperbagel.train.stages import cfg, reward


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def student(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guidance-distilled student: two steps, a sheet and held-out figures on the way."""
    out = tmp_path_factory.mktemp("cfg") / "run"
    run(
        cfg,
        base,
        out,
        max_steps=2,
        held_out=HELD_OUT,
        held_out_groups=1,
        sample_every=2,
        **{k: v for k, v in QUICK.items() if k != "sample_every"},
    )
    return out / "export"


@pytest.fixture(scope="module")
def head(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward, two steps old."""
    out = tmp_path_factory.mktemp("reward") / "run"
    run(reward, base, out, max_steps=2, held_out=HELD_OUT, held_out_groups=1, log_every=1)
    return out / "export"
