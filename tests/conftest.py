"""Threads of the test process, set before torch is first loaded, also where the tests are run without `make`; and a cache of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Small tensors gain nothing from more threads, and threads that spin on a busy machine cost up to 60 times.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What commands keep for the next one stays out of the user's home."""
    os.environ["HYPERBAGEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def gpu() -> Iterator[object]:
    """Device "cuda" exists: a real GPU where there is one, else a simulated one, which is what the test gets then."""
    import torch
    from simulated_gpu import simulated_gpu

    if torch.cuda.is_available():
        yield None
    else:
        with simulated_gpu() as simulated:
            yield simulated
