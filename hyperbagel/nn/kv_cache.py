"""Preallocated keys and values of several sequences of different lengths.

Shape legend: B rows (sequences), H key-value heads, K slots, D values of a head, n new tokens a row (padded to the longest).

A slot is not a position: in BAGEL every token of an image shares one RoPE position. Keys are stored after norm and RoPE, so attention
never asks for a position. A cache with taps also keeps what drafters read: hidden states of some layers and the positions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Plan:
    """Where n new tokens go and what they see; made once per forward, used by every layer."""

    slots: slice | Tensor  # one slice for all rows, or [B, n]
    visible: int  # keys 0 .. visible - 1 are attended over
    mask: Tensor | None  # bool, broadcasts to [B, 1, n, visible]; None: everything
    causal: bool  # bottom-right causal, no mask needed


class KVCache:
    """Keys and values, `lengths` of them valid in each row.

    `taps`: layers whose incoming hidden states are kept too (the number of layers stands for what leaves the last), each
    [B, 1, K, width]; with any taps RoPE positions [B, 1, K, 1] are kept as well.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        *,
        rows: int,
        device: torch.device | str,
        dtype: torch.dtype,
        taps: Sequence[int] = (),
        width: int = 0,
    ) -> None:
        empty = torch.empty(rows, heads, 0, head_dim, device=device, dtype=dtype)
        self.k = [empty for _ in range(layers)]
        self.v = [empty for _ in range(layers)]
        self.taps = tuple(taps)
        self.tapped = [torch.empty(rows, 1, 0, width, device=device, dtype=dtype) for _ in self.taps]
        self.positions = [torch.empty(rows, 1, 0, 1, device=device, dtype=torch.long)] if self.taps else []
        self.lengths = [0] * rows
        self._whole: tuple[list[Tensor], ...] | None = None  # the stores with the rows that left, whose places others may take

    def _stores(self) -> tuple[list[Tensor], ...]:
        """Everything that has a slot dimension, [B, *, K, *]."""
        return self.k, self.v, self.tapped, self.positions

    @property
    def capacity(self) -> int:
        return min(x.shape[2] for store in self._stores() for x in store)  # equal, unless memory ran out in `add`

    @property
    def nbytes(self) -> int:
        """Memory of everything stored."""
        return sum(x.nbytes for store in self._stores() for x in store)

    def reserve(self, slots: int) -> None:
        """Makes room for `slots` keys per row; what is stored stays."""
        if slots <= self.capacity:
            return
        self._whole = None
        for store in self._stores():
            for i, old in enumerate(store):
                new = old.new_zeros(old.shape[0], old.shape[1], max(slots, old.shape[2]), old.shape[3])
                new[:, :, : old.shape[2]] = old
                store[i] = new

    def grow(self, slots: int) -> None:
        """`reserve` for a cache that grows token by token: it doubles, by 1,024 slots at most, so that it is rarely copied."""
        if slots > self.capacity:
            self.reserve(max(slots, min(2 * self.capacity, self.capacity + 1024)))

    def plan(self, counts: Sequence[int], causal: bool) -> Plan:
        """Makes room for counts[b] new tokens in row b. They see their row's past, and one another causally or fully."""
        n, ends = max(counts), [have + new for have, new in zip(self.lengths, counts, strict=True)]
        self.grow(max(self.lengths) + n)
        device = self.k[0].device
        if len(set(self.lengths)) == 1 and min(counts) == n:
            return Plan(slice(self.lengths[0], ends[0]), ends[0], None, causal)
        start = torch.tensor(self.lengths, device=device)[:, None]
        slots = start + torch.arange(n, device=device)
        key = torch.arange(max(ends), device=device)
        end = torch.tensor(ends, device=device)[:, None]
        # causal: query i sees keys up to its own slot; full: up to its row's end. Padding queries see what the last real one sees.
        last = slots.minimum(end - 1) if causal else end - 1
        return Plan(slots, max(ends), (key <= last.unsqueeze(-1)).unsqueeze(1), False)

    def plan_blocks(self, own: Tensor) -> Plan:
        """The plan of a lone row in blocks: token i, of block own[i], sees the past, its whole block and the blocks before it. Blocks
        0 1 2 2, a text of two tokens and then two tokens that see each other:

        1 . . .
        1 1 . .
        1 1 1 1
        1 1 1 1
        """
        have, n = self.lengths[0], len(own)
        seen = torch.ones(n, have + n, dtype=torch.bool, device=own.device)
        seen[:, have:] = own[:, None] >= own
        return replace(self.plan([n], causal=False), mask=seen[None, None])

    def append(self, layer: int, plan: Plan, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v [B, H, n, D] at the plan's slots and returns all visible ones. Only `advance` changes the lengths."""
        _write(self.k[layer], plan, k)
        _write(self.v[layer], plan, v)
        return self.k[layer][:, :, : plan.visible], self.v[layer][:, :, : plan.visible]

    def tap(self, layer: int, plan: Plan, parts: Sequence[Tensor | None]) -> None:
        """Keeps the hidden states that enter `layer`, streams [B, n, E] in slot order, if that layer is tapped."""
        if layer in self.taps:
            _write(self.tapped[self.taps.index(layer)], plan, torch.cat([x for x in parts if x is not None], dim=1).unsqueeze(1))

    def tap_positions(self, plan: Plan, positions: Tensor) -> None:
        """Keeps the RoPE positions [B, n] of new tokens, if anything is tapped."""
        if self.taps:
            _write(self.positions[0], plan, positions[:, None, :, None])

    def advance(self, counts: Sequence[int]) -> None:
        """Adds counts[b] to the length of row b, once every layer has appended that many tokens."""
        self.lengths = [have + new for have, new in zip(self.lengths, counts, strict=True)]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forgets everything after the first lengths[b] tokens of row b."""
        shorter = all(0 <= new <= have for new, have in zip(lengths, self.lengths, strict=True))
        assert shorter, f"cannot truncate {self.lengths} to {list(lengths)}"
        self.lengths = list(lengths)

    def keep(self, start: int, kept: Tensor, row: int = 0) -> None:
        """Row `row` keeps slots [0, start) and then, in this order, the slots `kept` (all >= start): the accepted path of a tree."""
        n = kept.numel()
        for store in self._stores():
            for x in store:
                x[row, :, start : start + n] = x[row].index_select(1, kept)
        self.lengths[row] = start + n

    def prefix(self, length: int) -> KVCache:
        """One row as if it ended at `length`. Shares storage: read it or stack it, do not append to it."""
        assert len(self.lengths) == 1 and length <= self.lengths[0], f"no prefix of {length} in {self.lengths}"
        view = copy.copy(self)
        view.lengths, view._whole = [length], None
        return view

    def view(self, rows: slice) -> KVCache:
        """These rows alone. Shares storage: appends within the capacity show in both."""
        view = copy.copy(self)
        view.k, view.v, view.tapped, view.positions = ([x[rows] for x in store] for store in self._stores())
        view.lengths, view._whole = self.lengths[rows], None
        return view

    def select(self, rows: Sequence[int]) -> None:
        """Goes on with these rows alone, in this order. Only those that change places are copied; the others' room is kept for `add`."""
        self._whole = self._whole or tuple(map(list, self._stores()))
        moved = [(to, row) for to, row in enumerate(rows) if to != row]
        to, of = torch.tensor(moved, device=self.k[0].device, dtype=torch.long).view(-1, 2).unbind(1)
        for store, whole in zip(self._stores(), self._whole):
            for i, x in enumerate(whole):
                if moved:
                    x[to] = x[of]  # with what is behind their ends: nothing of another request stays (`_clear`)
                store[i] = x[: len(rows)]
        self.lengths = [self.lengths[row] for row in rows]

    def add(self, caches: Sequence[KVCache], extra: int, spent: bool = False) -> None:
        """Copies the rows of other caches behind its own, with room for `extra` more tokens in every row. Its own rows are copied only
        where there is no room. Out of memory, it is as before. spent: see `stack`."""
        self._whole = self._whole or tuple(map(list, self._stores()))
        have, top = len(self.lengths), max(self.lengths, default=0)
        rows = have + sum(len(cache.lengths) for cache in caches)
        slots = max(top, *(n for cache in caches for n in cache.lengths)) + extra
        for store, whole in zip(self._stores(), self._whole):
            for i, x in enumerate(whole):
                held, heads, room, width = x.shape
                if rows > held or slots > room:
                    room = max(slots, min(2 * room, room + 1024)) if slots > room else room
                    whole[i] = x.new_zeros(max(rows, held), heads, room, width)
                    whole[i][:have, :, :top] = x[:have, :, :top]
                    store[i] = whole[i][:have]
        for store, whole in zip(self._stores(), self._whole):
            store[:] = [x[:rows] for x in whole]
        self._copy(caches, spent, have)
        self._clear(have)

    def untap(self) -> None:
        """Keeps no hidden states and positions any more, and frees those that it kept."""
        self.taps, self.tapped, self.positions, self._whole = (), [], [], None

    def fork(self) -> KVCache:
        """An independent copy."""
        return KVCache.stack([self], taps=self.taps)

    @staticmethod
    def stack(caches: Sequence[KVCache], extra: int = 0, taps: Sequence[int] = (), spent: bool = False) -> KVCache:
        """The rows of several caches copied into one, with room for `extra` more tokens per row; the originals stay as they are.

        `taps`: () keeps none, else those of the caches. `spent`: the originals are not needed any more, so each frees its storage as
        soon as it is copied.
        """
        lengths = [n for cache in caches for n in cache.lengths]
        first = caches[0]
        _, heads, _, head_dim = first.k[0].shape
        width = first.tapped[0].shape[-1] if taps else 0
        device, dtype = first.k[0].device, first.k[0].dtype
        whole = KVCache(len(first.k), heads, head_dim, rows=len(lengths), device=device, dtype=dtype, taps=taps, width=width)
        whole.reserve(max(lengths) + extra)
        whole._copy(caches, spent)
        return whole

    def load(self, caches: Sequence[KVCache], spent: bool = False) -> None:
        """Copies several caches into this one, as many rows as it has and none longer than its capacity. Its storage stays in place."""
        self._copy(caches, spent)
        self._clear()

    def _clear(self, at: int = 0) -> None:
        """Zeroes the slots behind rows `at` and following: what an earlier request left there is only masked, and 0 * nan is nan."""
        for store in (*self.k, *self.v):
            for row, n in zip(store[at:], self.lengths[at:], strict=True):
                row[:, n:].zero_()

    def _copy(self, caches: Sequence[KVCache], spent: bool, at: int = 0) -> None:
        """Rows `at` and following become those of the caches."""
        lengths = [*self.lengths[:at], *(n for cache in caches for n in cache.lengths)]
        for cache in caches:
            rows, top = len(cache.lengths), max(cache.lengths)
            if self.taps:
                assert cache.taps == self.taps, f"got a cache with taps {cache.taps}, expected {self.taps}"
            for mine, theirs in zip(self._stores() if self.taps else (self.k, self.v), cache._stores()):
                for x, y in zip(mine, theirs, strict=True):
                    x[at : at + rows, :, :top] = y[:, :, :top]
            at += rows
            if spent:
                cache._whole = None
                for store in cache._stores():
                    store.clear()  # its lengths stay: callers still ask how long the context was
        self.lengths = lengths


def _write(store: Tensor, plan: Plan, new: Tensor) -> None:
    """new [B, *, n, *] into store [B, *, K, *] at the plan's slots."""
    if isinstance(plan.slots, slice):
        store[:, :, plan.slots] = new
    else:
        rows = torch.arange(new.shape[0], device=new.device)[:, None]
        # Padding may be written past the slots promised to its row; the next append overwrites it.
        store[rows, :, plan.slots] = new.transpose(1, 2).to(store.dtype)  # under autocast `new` is bf16
