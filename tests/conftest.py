"""Threads of the test process: set before torch is first loaded, also where the tests are run without `make`."""

from __future__ import annotations

import os

# Small tensors gain nothing from more threads, and threads that spin on a busy machine cost up to 60 times.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
