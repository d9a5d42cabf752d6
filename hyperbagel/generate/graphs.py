"""Steps with fixed shapes and fixed buffers, so that a GPU can replay them as CUDA graphs without the CPU launching every kernel.

On a CPU the same fixed-shape steps run as they are. What a step computes does not change, only who launches it.

Shape legend: B rows, V vocabulary, N latent tokens, C values of a latent token, K slots of the cache.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from hyperbagel.core.errors import Notice
from hyperbagel.core.files import one_line
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.nn.kv_cache import KVCache, Plan
from hyperbagel.nn.trees import after_past, ancestors

GRANULE = 512  # capacities are multiples of it: few graphs, little attention over empty slots
_RECORDING = threading.RLock()  # the garbage collector is process-wide, and a server has a thread per GPU


@contextmanager
def no_collection() -> Iterator[None]:
    """Collects Python's garbage before the block and none inside it, in one thread at a time. An unused graph may survive in a reference
    cycle, and if it is freed while another graph is being recorded, that recording fails (seen on an H200)."""
    with _RECORDING:
        was = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            if was:
                gc.enable()


class Captured:
    """Calls `function`, which reads and writes tensors that stay in place: eagerly at first, then recorded, from then on replayed.

    Every call is a real step, including the first (which also warms up the libraries) and the recorded one. On a CPU all are eager.
    `compiler` is a backend of torch.compile ("inductor"), or None for none.
    """

    def __init__(self, function: Callable[[], Tensor], device: torch.device, compiler: str | None = None) -> None:
        self.function = function if compiler is None else torch.compile(function, backend=compiler, dynamic=False)
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.stream is None:
            return self.function()
        if self.out is None:
            # On the stream that will be captured (the default one cannot be), so that the graph finds its workspaces made.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.out = self.function()
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            return self.out.clone()
        if self.graph is None and not self._record():
            return self.function()
        assert self.graph is not None
        self.graph.replay()
        return self.out.clone()  # the next replay overwrites it

    def _record(self) -> bool:
        """Records the step, computing nothing; whether that worked. If not, all later calls are eager: the same numbers, more slowly."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # thread_local: other threads of a server may use the device meanwhile.
            with no_collection(), torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.out = self.function()
        except torch.OutOfMemoryError:
            torch.cuda.set_stream(current)
            raise  # a smaller batch may have the room
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a failed recording leaves its own stream current
            self.stream = None
            warnings.warn(f"a step could not be recorded as a CUDA graph ({one_line(error)}); it runs without one", Notice, stacklevel=2)
            return False
        self.graph = graph
        return True


def causal_plan(at: Tensor, capacity: int) -> Plan:
    """New tokens in slots `at` [B, n] of a cache with K = `capacity` slots per row: each sees all slots up to its own."""
    slots = torch.arange(capacity, device=at.device)
    return Plan(at, capacity, (slots <= at.unsqueeze(-1)).unsqueeze(1), causal=False)  # mask [B, 1, n, K]


class _Static:
    """A cache of K slots per row with lengths and positions on the device, so that no shape and no address depends on their values."""

    def __init__(self, model: Bagel, rows: int, capacity: int, taps: Sequence[int] = ()) -> None:
        device = model.device
        self.model, self.capacity = model, capacity
        self.cache = model.new_cache(rows, taps)
        self.cache.reserve(capacity)
        self.length = torch.zeros(rows, 1, dtype=torch.long, device=device)  # keys before the new ones
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=device)

    def forward(self, tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """tokens [B, n] after each row's keys, causal among themselves or nodes of trees with `parents` [B, n] -> logits [B, n, V]."""
        depths = torch.arange(tokens.shape[1], device=tokens.device)
        slots = self.length + depths
        if parents is None:
            plan = causal_plan(slots, self.capacity)
        else:
            seen = ancestors(parents)
            plan, depths = Plan(slots, self.capacity, after_past(seen, self.length, self.capacity), False), seen.sum(-1) - 1
        u = self.model.embed_text(tokens)
        hidden = self.model.backbone(Streams(u, None), self.position + depths, cache=self.cache, plan=plan).u
        assert hidden is not None
        return self.model.logits(hidden)


class StaticStep(_Static):
    """Decodes one token per row over a cache of K slots; slots beyond a row's length are masked.

    Rows of lengths 2 and 4 that write their new token (n) into K = 6 slots; what the query sees:

        1 1 n . . .
        1 1 1 1 n .
    """

    def __init__(self, model: Bagel, rows: int, capacity: int, compiler: str | None = None) -> None:
        super().__init__(model, rows, capacity)
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        self.run = Captured(self.compute, model.device, compiler)

    def release(self) -> None:
        """Frees cache and graph at once: `run` holds a bound method, so that the two objects would otherwise keep each other alive."""
        del self.run

    def load(self, caches: Sequence[KVCache], positions: Sequence[int], spent: bool = False) -> None:
        """Takes other contexts into the same buffers, so that a recorded graph stays valid."""
        self.cache.load(caches, spent)
        self.length.copy_(torch.tensor(self.cache.lengths)[:, None])
        self.position.copy_(torch.tensor(list(positions))[:, None])
        self.left = self.capacity - max(self.cache.lengths)

    def compute(self) -> Tensor:
        """Reads the buffers -> logits [B, V]; lengths and positions advance by one."""
        logits = self.forward(self.token)[:, -1]
        self.length += 1
        self.position += 1
        return logits

    def __call__(self, token: Tensor) -> Tensor:
        assert self.left > 0, f"got one token more than the {self.capacity} slots hold, expected `load` to have been given the room"
        self.left -= 1
        self.token.copy_(token)
        return self.run()


SIZES = (1, 4, 8, 16)  # tokens per row of one read; others are padded to the next size, so that few graphs are recorded


def padded(n: int) -> int:
    """The size that n tokens are padded to."""
    return next((size for size in SIZES if size >= n), -(-n // SIZES[-1]) * SIZES[-1])


class Kept(Protocol):
    """What reads the cache of a StaticRead, and is released with it."""

    def release(self) -> None: ...


class StaticRead(_Static):
    """Reads several new tokens per row at once, a draft to be verified, over a cache of K slots: a chain, causal, or a tree.

    A row of length 2 that reads 3 tokens (n: the token itself) in K = 6 slots:

        1 1 n . . .
        1 1 1 n . .
        1 1 1 1 n .

    Slots after the tokens hold padding: they lie beyond `lengths`, so nothing sees them, and the next read overwrites them.
    """

    def __init__(self, model: Bagel, rows: int, capacity: int, taps: Sequence[int] = (), compiler: str | None = None) -> None:
        super().__init__(model, rows, capacity, taps)
        self.compiler = compiler
        # (size, whether trees) -> the buffer of tokens and parents [2, B, size], and the step that reads it
        self.runs: dict[tuple[int, bool], tuple[Tensor, Captured]] = {}
        self.drafts: dict[object, Kept] = {}  # drafter -> its graphs, which hold the addresses of this cache

    def release(self) -> None:
        """Frees graphs and buffers at once: each holds a bound method of this object, and with it the object."""
        for draft in self.drafts.values():
            draft.release()
        self.drafts.clear()
        self.runs.clear()

    def __call__(self, tokens: Tensor, position: Tensor, parents: Tensor | None = None) -> Tensor:
        """tokens [B, n] (-1 read as 0), each row's first at `position` [B] -> logits [B, n, V]; the cache grows by n per row.

        parents [B, n]: of a tree's nodes, as in speculative.tree; None: a chain. Padding hangs on the root, and no node sees it.
        """
        rows, n = tokens.shape
        size = padded(n)
        assert max(self.cache.lengths) + size <= self.capacity, f"got {size} tokens more than the {self.capacity} slots hold"
        key = size, parents is not None
        if key not in self.runs:
            buffer = torch.zeros(2, rows, size, dtype=torch.long, device=self.model.device)
            step = partial(self.forward, *buffer) if key[1] else partial(self.forward, buffer[0])
            self.runs[key] = buffer, Captured(step, self.model.device, self.compiler)
        buffer, run = self.runs[key]
        buffer[0, :, :n].copy_(tokens.clamp(min=0))
        if parents is not None:
            buffer[1, :, :n].copy_(parents)
            buffer[1, :, n:] = 0
        self.length.copy_(torch.tensor(self.cache.lengths)[:, None])
        self.position.copy_(position[:, None])
        logits = run()[:, :n]
        self.cache.advance([n] * rows)
        return logits


K = TypeVar("K")
S = TypeVar("S", StaticStep, StaticRead)


class GraphRunner:
    """`decode`'s runner with fixed shapes. It keeps the steps of the last `keep` (rows, capacity) pairs, so that graphs outlive a request.

    A runner serves one request at a time. Its logits equal EagerRunner's up to the order of additions in attention.
    """

    def __init__(self, model: Bagel, *, compiler: str | None = None, keep: int = 2) -> None:
        self.model, self.compiler, self.keep = model, compiler, keep
        self.steps: dict[tuple[int, int], StaticStep] = {}  # least recently used first
        self.reads: dict[tuple[int, int, tuple[int, ...]], StaticRead] = {}
        self.step: StaticStep | None = None

    @torch.inference_mode()
    def begin(self, caches: Sequence[KVCache], positions: Sequence[int], room: int, spent: bool = False) -> None:
        key = len(positions), _capacity(caches, room)
        self.step = self._take(self.steps, key, lambda: StaticStep(self.model, *key, self.compiler))
        self.step.load(caches, positions, spent)

    def __call__(self, token: Tensor) -> Tensor:
        assert self.step is not None, "begin comes first"
        return self.step(token)

    def narrow(self, rows: Sequence[int]) -> bool:
        return False  # a graph has its number of rows

    def end(self) -> None:
        self.step = None

    @torch.inference_mode()
    def reader(self, caches: Sequence[KVCache], room: int, spent: bool = False) -> StaticRead:
        """For speculative decoding: reads up to `room` more tokens after these contexts, and keeps the hidden states that they keep."""
        key = sum(len(cache.lengths) for cache in caches), _capacity(caches, room + SIZES[-1]), caches[0].taps
        read = self._take(self.reads, key, lambda: StaticRead(self.model, *key, self.compiler))
        read.cache.load(caches, spent)
        return read

    def forget(self) -> None:
        """Frees all caches and graphs that are kept for later requests."""
        self.end()
        for step in self.steps.values():
            step.release()
        for read in self.reads.values():
            read.release()
        self.steps.clear()
        self.reads.clear()

    def _take(self, shelf: dict[K, S], key: K, make: Callable[[], S]) -> S:
        """The shelf's entry for `key`, made if absent, now the most recently used. A full shelf first releases its least recent one."""
        found = shelf.pop(key, None)
        while len(shelf) >= self.keep:  # before a new cache is made, so that both need not fit in memory
            shelf.pop(next(iter(shelf))).release()
        shelf[key] = make() if found is None else found
        return shelf[key]


def _capacity(caches: Sequence[KVCache], room: int) -> int:
    """Slots for these contexts and `room` more, in whole granules."""
    need = max(n for cache in caches for n in cache.lengths) + room
    return -(-need // GRANULE) * GRANULE


class StaticVelocity(Protocol):
    """What GraphVelocity needs of generate.image.GuidedVelocity."""

    where: Tensor  # [B, N]

    def begin(self, t: float) -> bool: ...
    def evaluate(self, x: Tensor, t: Tensor, with_guidance: bool) -> Tensor: ...


class GraphVelocity:
    """velocity(x_t [B, N, C], t) -> v [B, N, C] with one graph for guided steps and one for the others.

    A graph holds the addresses of its requests' contexts, so it serves these requests only; recording costs about as much as launching
    one step.
    """

    def __init__(self, velocity: StaticVelocity, compiler: str | None = None) -> None:
        self.velocity = velocity
        device = velocity.where.device
        self.t = torch.zeros(velocity.where.shape, device=device)
        self.x: Tensor | None = None
        self.runs = {on: Captured(lambda on=on: self._evaluate(on), device, compiler) for on in (False, True)}  # type: ignore[misc]

    def _evaluate(self, with_guidance: bool) -> Tensor:
        assert self.x is not None
        return self.velocity.evaluate(self.x, self.t, with_guidance)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        if self.x is None:
            self.x = torch.empty_like(x)
        self.x.copy_(x)
        self.t.fill_(t)
        return self.runs[self.velocity.begin(t)]()
