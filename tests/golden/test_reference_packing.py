"""Packed sequences against the reference's: order, positions, splits, mask, losses."""

import json
import random

import numpy as np
import torch
from archive import GOLDEN
from torch import Tensor
from train_batch import INSTRUCTION, SPEC, golden_train_batch

from hyperbagel.core.types import PackedBatch
from hyperbagel.data.packing import pack
from hyperbagel.data.plan import Dropout, Text, VaeImage, VitImage, apply_dropout
from hyperbagel.model.weights import load_tensors


def visible(batch: PackedBatch, row: int = 0) -> Tensor:
    """[S, S] who sees whom, straight from the rule."""
    order, split, sample = batch.order[row], batch.split_id[row], batch.sample_id[row]
    same_split = (split[:, None] == split) & batch.is_full[row]
    past = order[:, None] >= order
    foreign_noise = batch.is_noise[row] & (split[:, None] != split)
    return (past | same_split) & ~foreign_noise & (sample[:, None] == sample)


def read_order(batch: PackedBatch, row: int = 0) -> Tensor:
    """Indexes of a row's tokens in reading order; padding left out."""
    used = (batch.sample_id[row] >= 0).nonzero().flatten()
    return used[batch.order[row, used].argsort()]


def split_modes(batch: PackedBatch) -> tuple[list[int], list[str]]:
    index = read_order(batch)
    split = batch.split_id[0, index]
    lens = torch.unique_consecutive(split, return_counts=True)[1].tolist()
    firsts = index[torch.tensor([0, *np.cumsum(lens)[:-1].tolist()])]
    modes = ["noise" if batch.is_noise[0, i] else "full" if batch.is_full[0, i] else "causal" for i in firsts.tolist()]
    return lens, modes


def und_order(batch: PackedBatch, slots: Tensor) -> list[int]:
    return batch.order[0, slots].tolist()


def gen_order(batch: PackedBatch, slots: Tensor) -> list[int]:
    return batch.order[0, batch.su + slots].tolist()


def test_mixed_batch() -> None:
    golden = load_tensors(GOLDEN / "fp32" / "train_mixed.safetensors")
    told = json.loads((GOLDEN / "fp32" / "train_mixed.json").read_text())
    batch = golden_train_batch()
    index = read_order(batch)
    assert batch.rows == 1 and len(index) == batch.su + batch.sg == told["sequence_length"] == 105
    lens, modes = split_modes(batch)
    assert lens == told["flex"]["split_lens"][:-1] and modes == told["flex"]["attn_modes"][:-1]  # its last split is padding
    assert torch.unique_consecutive(batch.sample_id[0, index], return_counts=True)[1].tolist() == told["sample_lens"]
    assert torch.equal(batch.positions[0, index], golden["packed_position_ids"])
    assert torch.equal(batch.text_ids, golden["packed_text_ids"])
    assert und_order(batch, batch.text_slots) == golden["packed_text_indexes"].tolist()
    assert und_order(batch, batch.vit_slots) == golden["packed_vit_token_indexes"].tolist()
    assert gen_order(batch, batch.latent_slots) == golden["packed_vae_token_indexes"].tolist()
    assert torch.equal(batch.vit_patches, golden["packed_vit_tokens"])
    assert torch.equal(batch.vit_positions, golden["packed_vit_position_ids"])
    assert batch.vit_lens == golden["vit_token_seqlens"].tolist()
    assert torch.equal(batch.latent_positions, golden["packed_latent_position_ids"])
    assert und_order(batch, batch.ce_slots) == golden["ce_loss_indexes"].tolist()
    assert torch.equal(batch.ce_labels, golden["packed_label_ids"])
    assert torch.allclose(batch.ce_weights, golden["ce_loss_weights"])
    assert gen_order(batch, batch.latent_slots[batch.mse_index]) == golden["mse_loss_indexes"].tolist()
    assert torch.equal(visible(batch)[index][:, index], golden["dense_mask"])


def test_one_sample_a_row_is_the_same_sequence() -> None:
    golden = load_tensors(GOLDEN / "fp32" / "train_mixed.safetensors")
    batch = golden_train_batch(rows="one")
    assert batch.rows == 3 and batch.su == 31 and batch.sg == 12
    start = 0
    for row, length in enumerate((35, 39, 31)):
        index = read_order(batch, row)
        assert torch.equal(batch.positions[row, index], golden["packed_position_ids"][start : start + length])
        part = golden["dense_mask"][start : start + length, start : start + length]
        assert torch.equal(visible(batch, row)[index][:, index], part)
        start += length


def test_dropout() -> None:
    cases = json.loads((GOLDEN / "fp32" / "train_dropout_packing.json").read_text())
    assert len(cases) == 8
    pixels = np.zeros((32, 48, 3), np.uint8)
    plan = [
        VaeImage(np.zeros((32, 32, 3), np.uint8), enable_cfg=True),
        VitImage(np.zeros((42, 42, 3), np.uint8), enable_cfg=True),
        Text(INSTRUCTION, enable_cfg=True),
        VaeImage(pixels, loss=True),
    ]
    for case in cases:
        # chance 1/2 everywhere: with the shares of training hardly anything would be dropped in eight seeds
        sample = apply_dropout(plan, Dropout(0.5, 0.5, 0.5), random.Random(case["seed"]))
        batch = pack(
            [sample],
            SPEC,
            encode=lambda x: torch.zeros(len(x), 16, x.shape[2] // 8, x.shape[3] // 8),
            generator=torch.Generator().manual_seed(0),
        )
        lens, modes = split_modes(batch)
        assert (lens, modes) == (case["split_lens"], case["attn_modes"]), case["seed"]
        assert batch.positions[0, read_order(batch)].tolist() == case["position_ids"], case["seed"]
        assert und_order(batch, batch.text_slots) == case["text_indexes"]
        assert und_order(batch, batch.vit_slots) == case["vit_idx"]
        assert gen_order(batch, batch.latent_slots) == case["vae_idx"]
        assert (batch.sample_id >= 0).sum() == sum(case["sample_lens"])
