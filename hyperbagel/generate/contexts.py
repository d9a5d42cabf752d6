"""What recent requests had the model read, so that it need not read it again: pictures that are edited time after time, and conversations.

A conversation comes whole with each question: its pictures first, then question, answer, ..., question. What it has in common with a
recent one, from the start on, is copied from there.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import takewhile
from typing import Generic, NamedTuple, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from hyperbagel.generate.session import Parts, Session
from hyperbagel.nn.kv_cache import KVCache

T = TypeVar("T")
Item = str | Image


class _Recent(Generic[T]):
    """Sessions with something to each. Drops the least recently used when they are too many or take too much memory; never the newest."""

    def __init__(self, count: int, memory: int) -> None:
        self.count, self.memory = count, memory
        self.kept: OrderedDict[Hashable, tuple[Session, T]] = OrderedDict()

    def keep(self, key: Hashable, session: Session, more: T) -> None:
        self.kept[key] = session, more
        self.kept.move_to_end(key)
        while len(self.kept) > 1 and (len(self.kept) > self.count or self._bytes() > self.memory):
            self.kept.popitem(last=False)

    def _bytes(self) -> int:
        return sum(session.cache.nbytes for session, _ in self.kept.values())


class _Asked(NamedTuple):
    """The items of a context and where it stood behind each of them: (tokens, position)."""

    items: tuple[Hashable, ...]
    ends: list[tuple[int, int]]


class Contexts:
    """Belongs to one model and one thread."""

    def __init__(self, count: int = 8, memory: int = 2**30, conversations: int = 64) -> None:
        """count, conversations: how many pictures (or several for one edit) and conversations are kept. memory: bytes of keys and values,
        for the pictures and, as much again, for the conversations."""
        self._pictures = _Recent[Tensor](count, memory)
        self._questions = _Recent[_Asked](conversations, memory)

    def begin(self, parts: Parts, images: Sequence[Image], generator: torch.Generator) -> tuple[Session, int]:
        """A session that holds the pictures, as latents and patches, and how many of its tokens were found here (all or none).

        They depend on the pictures, those before them and the seed (latents are drawn from the posterior): these are the key. `generator`,
        fresh from its seed, is left as if the pictures had been prefilled with it.
        """
        key = generator.initial_seed(), *map(_digest, images)
        if key in self._pictures.kept:
            self._pictures.kept.move_to_end(key)
            session, state = self._pictures.kept[key]
            generator.set_state(state)
            return session.fork(), session.cache.lengths[0]
        session = Session.new(parts)
        for image in images:
            session.add_image(image, latents=True, generator=generator)
        self._pictures.keep(key, session.fork(), generator.get_state())
        return session, 0

    def ask(self, parts: Parts, items: Sequence[Item], taps: Sequence[int]) -> Session:
        """A session that has read pictures and texts, the last of them a question, and opened its answer. `reused` says how many tokens
        were found here; the same context as before is found with its answer opened, bit for bit."""
        keys, kept = tuple(map(_digest, items)), self._questions.kept
        # of equal ones the shortest: it may be the whole context, with its answer opened
        fits = [
            (_common(keys, asked.items), -len(asked.items), key)
            for key, (session, asked) in kept.items()
            if session.cache.taps == tuple(taps)
        ]
        n, _, best = max(fits, key=lambda fit: fit[:2], default=(0, 0, None))
        ends: list[tuple[int, int]] = []
        if n:
            kept.move_to_end(best)
            session, asked = kept[best]
            ends = asked.ends[:n]
            if not n == len(keys) == len(asked.items):  # else it is handed out, and a copy takes its place
                texts = sum(isinstance(item, str) for item in items[:n])
                session = _cut(session, *ends[-1], session.texts[:texts])
            session.reused = session.tokens
        else:
            session = Session.new(parts, taps)
        ends = [*ends, *read(session, items[n:])]
        session.open_answer()
        if n and n == len(kept[best][1].items):
            del kept[best]  # the conversation went on
        self._questions.keep((keys, tuple(taps)), session.fork(), _Asked(keys, ends))
        return session

    def forget(self) -> bool:
        """Frees all that is kept; whether that was anything."""
        held = bool(self._pictures.kept or self._questions.kept)
        self._pictures.kept.clear()
        self._questions.kept.clear()
        return held


def read(session: Session, items: Sequence[Item]) -> list[tuple[int, int]]:
    """Appends pictures, as patches, and texts -> (tokens, position) behind each. Pictures and the last text wait, to share a forward."""
    ends = []
    for i, item in enumerate(items):
        if isinstance(item, str):
            session.add_text(item, later=i == len(items) - 1)
        else:
            session.add_image(item, latents=False, later=True)
        ends.append((session.tokens, session.position + len(session.waiting_pictures) + len(session.waiting)))
    return ends


def _cut(session: Session, tokens: int, position: int, texts: list[list[int]]) -> Session:
    """A copy as it was after so many tokens and these texts; guidance, which answers have none of, cannot go on from it."""
    return Session(session.parts, KVCache.stack([session.cache.prefix(tokens)], taps=session.cache.taps), position, texts)


def _common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """How many items two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def _digest(item: Item) -> Hashable:
    if isinstance(item, str):
        return item
    return item.mode, item.size, hashlib.sha256(item.tobytes()).digest()
