"""Properties of plans and packing that hold for any sample; the reference's own sequences are in tests/golden."""

import pickle
import random
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.core.types import PackedBatch
from hyperbagel.data.packing import PackSpec, assign_rows, draw_timesteps, fill, lay_out, pack, stream_lengths
from hyperbagel.data.plan import Dropout, Sample, Text, VaeImage, VitImage, apply_dropout, picture_items
from hyperbagel.data.transforms import grid_positions
from hyperbagel.nn.masks import dense_mask

SPEC = PackSpec(1, 2, 3, 4, vit_patch=8, vit_per_side=8, latent_patch=2, latent_stride=16, latent_per_side=4, latent_values=16)


def picture(seed: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def encode(x: Tensor) -> Tensor:
    """A stand-in for the VAE: four channels of 8 x 8 means."""
    return torch.nn.functional.avg_pool2d(x, 8)[:, [0, 1, 2, 0]]


def packed(samples: Sequence[Sample], seed: int = 0, **options: object) -> PackedBatch:
    return pack(samples, SPEC, encode=encode, generator=torch.Generator().manual_seed(seed), **options)  # type: ignore[arg-type]


def t2i(n: int, copies: int = 1) -> Sample:
    return [Text(list(range(10, 10 + n)), enable_cfg=True), *picture_items(picture(n), None, loss=True, copies=copies, context=False)]


def edit(source: np.ndarray, target: np.ndarray) -> Sample:
    return [*picture_items(source, source, loss=False, context=True), Text([10, 11], enable_cfg=True), VaeImage(target, loss=True)]


def test_two_turns_of_editing() -> None:
    """A target that later turns see: noise and clean copy share a position, the ViT block has the next one."""
    source, target = picture(0), picture(1)
    sample: Sample = [
        *picture_items(source, source, loss=False, context=True),
        Text([10, 11]),
        *picture_items(target, target, loss=True, copies=2, context=True),
        Text([12], loss=True),
    ]
    batch = packed([sample])
    index = batch.order[0].argsort()
    split, noise = batch.split_id[0, index], batch.is_noise[0, index]
    first = {int(s): int(batch.positions[0, index][(split == s).nonzero()[0]]) for s in split.unique()}
    # clean, ViT, text (4 tokens: 2..5), two noise draws and their clean copy at 6, ViT at 7, text from 8
    assert list(first.values()) == [0, 1, 2, 6, 6, 6, 7, 8]
    seen = dense_mask(batch)[0, 0][index][:, index]
    for s in split[noise].unique():
        outside = seen[split != s][:, split == s]
        assert not outside.any()  # nobody sees another's noise
        assert seen[split == s][:, split == s].all()
    last = (split == split.max()).nonzero().flatten()
    assert seen[last[-1]].sum() == (~noise).sum()  # the answer sees everything clean
    assert len(batch.mse_index) == 2 * 4 and (batch.timesteps[batch.mse_index] > 0).all()
    clean = sorted(set(range(len(batch.timesteps))) - set(batch.mse_index.tolist()))
    assert len(clean) == 8 and (batch.timesteps[clean] == 0).all()


def test_noise_copies_differ_in_noise_only() -> None:
    batch = packed([t2i(3, copies=3)])
    x0, e, t = (v.unflatten(0, (3, 4)) for v in (batch.latents, batch.noise, batch.timesteps))
    assert torch.equal(x0[0], x0[1]) and torch.equal(x0[0], x0[2])
    assert not torch.equal(e[0], e[1]) and t[0, 0] != t[1, 0]
    assert (t == t[:, :1]).all()  # one t for each picture


def test_rows_hold_the_same_samples() -> None:
    samples = [t2i(n) for n in (1, 7, 3, 12, 2)]
    one, two = packed(samples), packed(samples, rows="packed", row_tokens=40)
    assert one.rows == 5 and two.rows == 2
    assert torch.equal(one.text_ids, two.text_ids) and torch.equal(one.latents, two.latents) and torch.equal(one.timesteps, two.timesteps)
    for batch in (one, two):
        for number in range(5):
            member = batch.sample_id == number
            assert member.sum() == sum(stream_lengths(samples[number], SPEC))
            assert torch.equal(batch.positions[member].unique(), torch.arange(len(samples[number][0].ids) + 3))  # type: ignore[union-attr]
            assert member.any(1).sum() == 1
        assert (batch.split_id[batch.sample_id < 0] == -1).all()
    assert packed(samples, pad_to=16).su % 16 == 0


def test_packed_rows_are_level() -> None:
    rng = random.Random(0)
    lengths = [(rng.randint(5, 60), rng.choice((0, 16, 64))) for _ in range(64)]
    rows = assign_rows(lengths, "packed", 300)
    load = np.zeros((max(rows) + 1, 2))
    for row, length in zip(rows, lengths, strict=True):
        load[row] += length
    assert set(rows) == set(range(len(load)))
    assert load.sum() / (len(load) * load.max(0).sum()) > 0.9


def test_answers() -> None:
    batch = packed([[Text([10, 11]), Text([20, 21, 22], loss=True)], [Text([30], loss=True)]])
    assert batch.ce_labels.tolist() == [20, 21, 22, 2, 30, 2]
    slots = dict(zip(batch.text_slots.tolist(), batch.text_ids.tolist(), strict=True))
    assert [slots[s] for s in batch.ce_slots.tolist()] == [1, 20, 21, 22, 1, 30]  # each predicts the next
    assert torch.allclose(batch.ce_weights, torch.tensor([0.5] * 4 + [2**-0.5] * 2))
    assert batch.sg == 0 and len(batch.latents) == 0 and batch.latents.shape[1] == SPEC.latent_values


def test_dropout_shares_and_ties() -> None:
    plan: Sample = [Text([1], enable_cfg=True), Text([2], tied=True), VitImage(picture(0), enable_cfg=True), Text([3])]
    rng = random.Random(0)
    drawn = [[item.dropped for item in apply_dropout(plan, Dropout(0.1, 0.3, 0.3), rng)] for _ in range(4000)]
    shares = np.mean(drawn, axis=0)
    assert abs(shares[0] - 0.1) < 0.02 and abs(shares[2] - 0.3) < 0.03 and shares[3] == 0
    assert all(d[0] == d[1] for d in drawn)


def test_timesteps() -> None:
    t = draw_timesteps(20_000, torch.Generator().manual_seed(0), 1.0)
    assert ((t > 0) & (t < 1)).all() and abs(t.mean() - 0.5) < 0.01
    logit = torch.logit(t.double())
    assert abs(logit.std() - 1) < 0.02
    shifted = draw_timesteps(20_000, torch.Generator().manual_seed(0), 3.0)
    assert torch.allclose(torch.logit(shifted.double()), logit + np.log(3), atol=1e-3)  # a shift adds log s to the logit


def test_same_generator_same_batch() -> None:
    a, b, c = packed([t2i(4)], 1), packed([t2i(4)], 1), packed([t2i(4)], 2)
    assert torch.equal(a.noise, b.noise) and torch.equal(a.timesteps, b.timesteps) and not torch.equal(a.noise, c.noise)


def test_pictures_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="VAE picture: got 40x40"):
        packed([[VaeImage(picture(0, 40), loss=True)]])
    with pytest.raises(InputError, match="ViT picture"):
        packed([[VitImage(picture(0, 72))]])
    with pytest.raises(InputError, match="nothing is left"):
        packed([[Text([1], dropped=True)]])


def test_a_shared_picture_is_encoded_once() -> None:
    seen: list[int] = []

    def counting(x: Tensor) -> Tensor:
        seen.append(len(x))
        return encode(x)

    pack([t2i(3, copies=4), t2i(5, copies=2)], SPEC, encode=counting, generator=torch.Generator())
    assert seen == [2]


def test_a_layout_survives_another_process() -> None:
    """Laid out, pickled and filled elsewhere: the batch that `pack` makes, each distinct picture sent once."""
    mixed = [t2i(3, copies=4), t2i(5), edit(picture(7), picture(8)), edit(picture(9, side=16), picture(10))]
    whole = packed(mixed, seed=3, pad_to=4)
    layout = pickle.loads(pickle.dumps(lay_out(mixed, SPEC, pad_to=4)))
    assert sum(len(stack) for stack in layout.vae.stacks) == 6 and len(layout.vae.stacks) == 2  # two sizes
    again = fill(layout, SPEC, encode=encode, generator=torch.Generator().manual_seed(3))
    for field in fields(PackedBatch):
        a, b = getattr(whole, field.name), getattr(again, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name


def test_positions_of_a_model_that_spreads_small_pictures_over_its_table() -> None:
    spec, sample = replace(SPEC, interpolate=True), edit(picture(0), picture(1))
    arrays = lay_out([sample], spec).arrays
    assert arrays["latent_positions"].tolist() == 2 * grid_positions(2, 2, 4, True).tolist() != 2 * grid_positions(2, 2, 4).tolist()
    assert arrays["vit_positions"].tolist() == grid_positions(4, 4, 8, True).tolist()


def test_a_tied_text_goes_with_the_one_before_it() -> None:
    plan: Sample = [Text([0]), Text([1], enable_cfg=True), Text([2], tied=True), Text([3], tied=True)]
    assert [item.dropped for item in apply_dropout(plan, Dropout(text=1.0), random.Random(0))] == [False, True, True, True]


@pytest.mark.parametrize("shape", [(8, 72), (72, 8)])
def test_a_picture_with_too_many_patches_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="up to 64 a side"):
        packed([[VitImage(np.zeros((*shape, 3), np.uint8)), Text([1], loss=True)]])
