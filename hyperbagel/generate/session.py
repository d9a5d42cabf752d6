"""One conversation: its keys and values, its RoPE position, and the snapshots that guidance needs.

Context rules (BAGEL): text is causal and each token advances the position by one; an image, as ViT patches or as clean latents, sees
all of itself, shares one position and advances it by one. Input pictures of a generation give a latent block, then a ViT block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.transforms import ImageTransform, grid_positions, patchify
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import ImageSizes
from hyperbagel.model.inspection import check_memory
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import load_folder
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.nn.projections import store_by_columns
from hyperbagel.nn.quantized import Codes

# Blocks of up to this many tokens in all share a forward: below, a forward costs about the same whatever is in it; above, attention
# without a mask is worth a forward each. In fp32 alone: in bf16 the reference's own division of the work stays nearest to its numbers
# (golden edits of two pictures, AMX: 2.2 % of latents away from fp32 with a shared forward, under 2 % without).
_SHARED_FORWARD = 512


def image_transform(sizes: ImageSizes) -> ImageTransform:
    """The resize rule that these limits describe."""
    return ImageTransform(sizes.max_size, sizes.min_size, sizes.stride, sizes.max_pixels)


@dataclass(frozen=True)
class Parts:
    """Everything a session works with; shared by all sessions, never changed by them."""

    model: Bagel
    vae: AutoEncoder
    tokenizer: Tokenizer
    vae_transform: ImageTransform
    vit_transform: ImageTransform

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        codes: Codes | None = None,
    ) -> Parts:
        """Reads a folder in BAGEL's layout (`load_folder`). Raises InputError if it is not one, or its tokenizer does not belong to its
        weights, or there is no memory for these (`check_memory`)."""
        check_memory(folder, torch.device(device), dtype, codes)
        model, vae = load_folder(folder, device, dtype, attention, codes)
        store_by_columns(model)
        options, tokenizer, known = model.config.options, Tokenizer.from_folder(folder), model.config.llm.vocab_size
        if tokenizer.largest_id >= known:
            raise InputError(
                f"{folder}: got a tokenizer with ids up to {tokenizer.largest_id}, expected below {known} (vocab_size in llm_config.json), "
                "take the tokenizer that belongs to these weights"
            )
        return cls(model, vae, tokenizer, image_transform(options.vae_transform), image_transform(options.vit_transform))


@dataclass
class Branch:
    """A context that a denoising step can look at: the first `length` tokens of a cache, and the position that follows them."""

    cache: KVCache
    length: int
    position: int

    def view(self) -> KVCache:
        """The cache as if it ended at `length`; shares storage, for reading only."""
        return self.cache.prefix(self.length)


@dataclass
class Session:
    """One conversation: a cache of one row to which texts, pictures and answers are appended, and what guidance leaves out of it."""

    parts: Parts
    cache: KVCache
    position: int = 0
    texts: list[list[int]] = field(default_factory=list)  # ids of the texts that the image-dropped context holds
    dropped: tuple[int, int] = (0, 0)  # (tokens, position) before the last text
    last_size: tuple[int, int] | None = None  # (height, width) of the last input image, after its resize
    waiting_pictures: list[Streams] = field(default_factory=list)  # pictures that are not in the cache yet (`add_image`)
    waiting: list[int] = field(default_factory=list)  # ids of a text that is not in the cache yet (`add_text`), behind those pictures
    reused: int = 0  # tokens that an earlier request had read
    opened: Tensor | None = None  # [V] logits after im_start, with which the cache then ends (`open_answer`)

    @classmethod
    def new(cls, parts: Parts, taps: Sequence[int] = ()) -> Session:
        """An empty conversation. `taps`: layers whose hidden states the cache keeps, for a drafter."""
        return cls(parts, parts.model.new_cache(taps=taps))

    def fork(self) -> Session:
        """An independent copy; this one stays as it is."""
        return replace(self, cache=self.cache.fork(), texts=list(self.texts))

    # -- context ---------------------------------------------------------------------------------------------------------------

    def add_text(self, text: str, *, guided: bool = True, later: bool = False) -> None:
        """Appends im_start + ids + im_end, causal. Raises InputError if it does not fit.

        guided: whether guidance may drop the text (never the thinking that a model adds itself). later: it waits for the first evaluation
        of a picture or for `open_answer`, which then reads it, or for whatever else needs it first: one forward less.
        """
        tokenizer = self.parts.tokenizer
        ids = [tokenizer.im_start, *tokenizer.encode(text), tokenizer.im_end]
        self._make_way(len(ids))
        self.check_room(len(ids))
        if guided:
            self.dropped = (self.tokens, self.position + len(self.waiting_pictures))
            self.texts.append(ids)
        self.waiting = ids
        if not later:
            self.settle()

    def settle(self) -> None:
        """Prefills the pictures and the text that wait, if any, and takes back the start of an answer."""
        self._close_answer()
        if self.waiting_pictures or self.waiting:
            self._read(self.waiting)
            self.waiting = []

    def _read(self, ids: Sequence[int], wanted: str = "") -> Tensor | None:
        """Reads the pictures that wait and then a text in one forward; returns the wanted hidden states [1, n, E]."""
        hidden = _forward_blocks(self.parts.model, self.cache, self.position, self.waiting_pictures, ids, wanted)
        self.position, self.waiting_pictures = self.position + len(self.waiting_pictures) + len(ids), []
        return hidden

    def _read_pictures(self) -> None:
        if self.waiting_pictures:
            self._read([])

    def _make_way(self, tokens: int) -> None:
        """Reads what must be in the cache before `tokens` more can wait, and takes back the start of an answer."""
        self._close_answer()
        if self.waiting or not self._share_a_forward(sum(map(_tokens, self.waiting_pictures)) + tokens):
            self.settle()

    def _share_a_forward(self, tokens: int) -> bool:
        """Whether blocks of so many tokens in all share a forward."""
        return tokens <= _SHARED_FORWARD and self.parts.model.dtype == torch.float32

    def _close_answer(self) -> None:
        if self.opened is not None:
            self.cache.truncate([self.cache.lengths[0] - 1])
            self.position, self.opened = self.position - 1, None

    def open_answer(self) -> None:
        """Reads what waits and im_start in one forward, so that an answer's first token costs no step of its own. Whatever is appended
        later takes im_start back. Raises InputError if there is no room for an answer."""
        if self.opened is None:
            self.check_answer(1)
            before = self.cache.lengths[0], self.position, self.waiting_pictures
            try:
                hidden = self._read([*self.waiting, self.parts.tokenizer.im_start], wanted="last")
                assert hidden is not None
                logits = self.parts.model.logits(hidden[:, -1])[0]
            except BaseException:  # no memory left: all of it waits on
                length, self.position, self.waiting_pictures = before
                self.cache.truncate([length])
                raise
            self.waiting, self.opened = [], logits

    def add_image(
        self, image: Image, *, latents: bool, generator: torch.Generator | None = None, resize: bool = True, later: bool = False
    ) -> None:
        """Appends a picture: as clean latents and ViT patches (`latents`, for generation) or as ViT patches alone (understanding).

        The picture is first resized by the latent rule (`resize`), so that both blocks show the same pixels. `generator` gives the
        noise of the posterior sample, drawn on the CPU; None takes the mean. Guidance then has no text to drop until one is added.
        later: if it is small (_SHARED_FORWARD), in fp32 and without latents, it is read together with what follows.
        """
        if resize:
            image = self.parts.vae_transform.resize(image)
        blocks = [self.latent_block(self.parts.vae_transform(image), generator)] if latents else []
        blocks.append(self.vit_block(self.parts.vit_transform(image)))
        size = sum(map(_tokens, blocks))
        if later and not latents and self._share_a_forward(size):
            self._make_way(size)
            self.check_room(size)
            self.waiting_pictures = [*self.waiting_pictures, *blocks]
        else:
            self.add_blocks(blocks)
        self.dropped = (self.tokens, self.position + len(self.waiting_pictures))
        self.last_size = (image.height, image.width)

    def latent_block(self, pixels: Tensor, generator: torch.Generator | None) -> Streams:
        """A picture [3, H, W] as clean latents between the vision markers. Raises InputError if it is too large."""
        model, options = self.parts.model, self.parts.model.config.options
        tokens, (h, w) = encode_latents(self.parts, pixels, generator)
        check_latent_grid(h, w, options.max_latent_size, model.config.latent_stride)
        where = grid_positions(h, w, options.max_latent_size, options.interpolate_pos).to(model.device)
        return Streams(self.markers(), model.embed_latent(tokens, torch.zeros(tokens.shape[:2], device=model.device), where))

    def vit_block(self, pixels: Tensor) -> Streams:
        """A picture [3, H, W] as ViT patches between the vision markers. Raises InputError if it has too many."""
        model = self.parts.model
        patch = model.config.vit.patch_size
        patches = patchify(pixels, patch).to(model.device)
        options = model.config.options
        h, w = pixels.shape[1] // patch, pixels.shape[2] // patch
        limit = min(options.vit_max_num_patch_per_side, model.config.vit.positions_per_side)
        if max(h, w) > limit:
            raise InputError(
                f"got a picture of {w}x{h} ViT patches, expected at most {limit} a side; set vit_transform.max_size in bagel_config.json "
                f"to at most {limit * patch}"
            )
        where = grid_positions(h, w, options.vit_max_num_patch_per_side, options.interpolate_pos).to(model.device)
        seen = model.embed_vit(patches, where, [len(patches)]).unsqueeze(0)
        start, end = self.markers().split(1, dim=1)
        return Streams(torch.cat([start, seen, end], dim=1), None)

    def add_blocks(self, blocks: Sequence[Streams]) -> None:
        """Appends blocks. Each sees itself and all before it and takes one position; small ones share a forward (_SHARED_FORWARD)."""
        self.settle()
        sizes = [_tokens(block) for block in blocks]
        self.check_room(sum(sizes))
        for group in [blocks] if self._share_a_forward(sum(sizes)) else [[block] for block in blocks]:
            _forward_blocks(self.parts.model, self.cache, self.position, group)
            self.position += len(group)

    def markers(self) -> Tensor:
        """Embeddings of vision_start and vision_end, [1, 2, E]."""
        tokenizer, model = self.parts.tokenizer, self.parts.model
        return model.embed_text(torch.tensor([[tokenizer.vision_start, tokenizer.vision_end]], device=model.device))

    @property
    def tokens(self) -> int:
        """Tokens of the context, with what waits and without the start of an answer."""
        return self.cache.lengths[0] + sum(map(_tokens, self.waiting_pictures)) + len(self.waiting) - (self.opened is not None)

    def room(self) -> int:
        """Tokens that still fit into the model's context."""
        return self.parts.model.config.llm.max_position_embeddings - self.tokens

    def check_room(self, tokens: int) -> None:
        """Raises InputError if `tokens` more do not fit into the model's context."""
        limit = self.parts.model.config.llm.max_position_embeddings
        if tokens > self.room():
            raise InputError(
                f"got a context of {self.tokens + tokens} tokens, expected at most {limit}; shorten the text or use fewer images"
            )

    def check_answer(self, max_tokens: int) -> None:
        """Raises InputError if an answer of `max_tokens` and the marker before it do not fit behind the context."""
        limit, have = self.parts.model.config.llm.max_position_embeddings, self.tokens
        room = self.room() - 1
        if room < 1:
            self.check_room(2)  # no shorter answer would help
        if max_tokens > room:
            raise InputError(
                f"got max_tokens {max_tokens} behind a context of {have}, expected at most {room} ({limit} in all); lower max_tokens"
            )

    # -- guidance --------------------------------------------------------------------------------------------------------------

    def full(self) -> Branch:
        """The whole context."""
        self.settle()
        return self.so_far()

    def so_far(self) -> Branch:
        """The context without the text that waits."""
        self._close_answer()
        self._read_pictures()
        return Branch(self.cache, self.cache.lengths[0], self.position)

    def text_dropped(self) -> Branch:
        """The context before its last text: a prefix, so nothing is computed (but a picture that waits) or copied."""
        self._read_pictures()
        return Branch(self.cache, *self.dropped)

    def image_dropped(self) -> Branch:
        """All guided texts and no image, from position 0. The full context itself if that holds nothing else."""
        given = sum(len(ids) for ids in self.texts)
        if given == self.tokens:
            return self.full()
        cache, position = self.parts.model.new_cache(), 0
        for ids in self.texts:
            _forward_blocks(self.parts.model, cache, position, [], ids)
            position += len(ids)
        return Branch(cache, cache.lengths[0], position)


def encode_latents(parts: Parts, pixels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, tuple[int, int]]:
    """pixels [3, H, W] in [-1, 1] -> latent tokens [1, h * w, C] and (h, w): a draw from the posterior, without `generator` its mean."""
    config = parts.model.config
    f, p = config.vae.downsample, config.options.latent_patch_size
    shape = (1, config.vae.z_channels, pixels.shape[1] // f, pixels.shape[2] // f)
    eps = torch.zeros(shape) if generator is None else torch.randn(shape, generator=generator)
    z = parts.vae.encode(pixels.unsqueeze(0).to(parts.model.device), eps.to(parts.model.device))
    return patchify(z, p), (z.shape[2] // p, z.shape[3] // p)


def _tokens(block: Streams) -> int:
    return sum(part.shape[1] for part in block if part is not None)


def _forward_blocks(
    model: Bagel, cache: KVCache, position: int, blocks: Sequence[Streams], ids: Sequence[int] = (), wanted: str = ""
) -> Tensor | None:
    """Runs blocks and then a text, the first of them at `position`, through the model into the cache, in one forward.

    A block sees itself and all before it and takes one position; each of the text's ids is a block of its own. Returns the hidden states
    [1, n, E] of the understanding tokens, as `wanted`: see Qwen2MoT. Latents come last in the cache, so a text may not follow them.
    """
    assert not ids or all(block.g is None for block in blocks), "got a text behind latents, expected a forward for each"
    streams: list[list[Tensor]] = [[], []]  # u and g
    own: list[list[int]] = [[], []]  # the block of each of their slots
    for i, block in enumerate(blocks):
        for stream, slots, tokens in zip(streams, own, block, strict=True):
            if tokens is not None:
                stream.append(tokens)
                slots += [i] * tokens.shape[1]
    if ids:
        streams[0].append(model.embed_text(torch.tensor([list(ids)], device=model.device)))
        own[0] += range(len(blocks), len(blocks) + len(ids))
    x = Streams(*(torch.cat(stream, dim=1) if stream else None for stream in streams))
    where = torch.tensor([*own[0], *own[1]], device=model.device)
    n, alone = len(where), len(blocks) + bool(ids) == 1  # attention needs no mask for one block or one text
    plan = cache.plan([n], causal=bool(ids)) if alone else cache.plan_blocks(where)
    hidden = model.backbone(x, (position + where).unsqueeze(0), cache=cache, plan=plan, wanted=wanted).u
    cache.advance([n])
    return hidden


def check_latent_grid(h: int, w: int, limit: int, stride: int) -> None:
    """Raises InputError if an h x w latent grid is outside the model's position table."""
    if not (0 < h <= limit and 0 < w <= limit):
        raise InputError(f"got a picture of {w * stride}x{h * stride} pixels, expected at most {limit * stride} a side for this model")
