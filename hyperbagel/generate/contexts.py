"""Prefilled pictures of recent requests, so that a picture that is edited again and again is prefilled once.

A picture's context depends on the picture, on those before it and on the seed (its latents are drawn from the posterior): these are the
key. Whatever follows the pictures, such as the text, is prefilled anew every time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from hyperbagel.generate.session import Parts, Session


class Contexts:
    """Belongs to one model and one thread. Drops the least recently used contexts when they are too many or take too much memory."""

    def __init__(self, count: int = 8, memory: int = 2**30) -> None:
        """memory: bytes of keys and values. The newest context stays, however large it is."""
        self.count, self.memory = count, memory
        self._kept: OrderedDict[Hashable, tuple[Session, Tensor]] = OrderedDict()

    def begin(self, parts: Parts, images: Sequence[Image], generator: torch.Generator) -> tuple[Session, int]:
        """A session that holds the pictures, as latents and patches, and how many of its tokens were found here (all or none).

        `generator`, fresh from its seed, is left as if the pictures had been prefilled with it.
        """
        key = generator.initial_seed(), *(_digest(image) for image in images)
        if key in self._kept:
            self._kept.move_to_end(key)
            session, state = self._kept[key]
            generator.set_state(state)
            return session.fork(), session.cache.lengths[0]
        session = Session.new(parts)
        for image in images:
            session.add_image(image, latents=True, generator=generator)
        self._kept[key] = session.fork(), generator.get_state()
        while len(self._kept) > 1 and (len(self._kept) > self.count or self._bytes() > self.memory):
            self._kept.popitem(last=False)
        return session, 0

    def _bytes(self) -> int:
        return sum(session.cache.nbytes for session, _ in self._kept.values())


def _digest(image: Image) -> tuple[str, tuple[int, int], bytes]:
    return image.mode, image.size, hashlib.sha256(image.tobytes()).digest()
