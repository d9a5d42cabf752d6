"""Threads of the test process, set before torch is first loaded, also where the tests are run without `make`; and a cache of its own."""

from __future__ import annotations

import os

import pytest

# Small tensors gain nothing from more threads, and threads that spin on a busy machine cost up to 60 times.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What commands keep for the next one stays out of the user's home."""
    os.environ["HYPERBAGEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
