"""The model's modules, key lists and training forward against the reference's."""

from __future__ import annotations

import json

import pytest
import torch
from archive import GOLDEN, TINY
from train_batch import golden_train_batch

from hyperbagel.flow.schedule import time_grid
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig, VaeConfig
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import load_folder, load_tensors
from hyperbagel.nn.layers import sincos_table


@pytest.mark.parametrize(("name", "build"), [("bagel7b", lambda: Bagel(BagelConfig())), ("ae", lambda: AutoEncoder(VaeConfig()))])
def test_keys_and_shapes_of_the_7b_checkpoint(name: str, build) -> None:
    with torch.device("meta"):
        module = build()
    ours = {key: list(p.shape) for key, p in module.named_parameters()}
    assert ours == json.loads((GOLDEN / f"{name}_keys.json").read_text())
    if name == "bagel7b":
        assert len(ours) == 1223 and sum(p.numel() for p in module.parameters()) == 14_607_260_128


def test_modules() -> None:
    model, vae = load_folder(TINY)
    golden = load_tensors(GOLDEN / "fp32" / "modules.safetensors")
    with torch.no_grad():
        seen = model.vit_model(golden["pixels"], golden["pos"], golden["lens"].tolist())
        mean, logvar = vae.moments(golden["vae_in"])
        close = {
            "time_embed": model.time_embedder(golden["t"]),
            "vit_out": seen,
            "connector_out": model.connector(golden["vit_out"]),
            "sincos_5x64": sincos_table(5, 64),
            "vae_moments": torch.cat([mean, logvar], dim=1),
            "vae_latent_mean": vae.encode(golden["vae_in"], torch.zeros_like(mean)),
            "vae_decoded": vae.decode(golden["vae_latent_mean"]),
        }
    for name, ours in close.items():
        torch.testing.assert_close(ours, golden[name], atol=2e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    for n, shift in ((50, 1.0), (50, 3.0), (24, 4.0), (10, 3.0)):
        torch.testing.assert_close(time_grid(n - 1, shift), golden[f"sched_{n}_{shift}"], atol=1e-7, rtol=0)


@pytest.mark.parametrize("rows", ["packed", "one"])
def test_training_forward_and_all_gradients(rows: str) -> None:
    model, _ = load_folder(TINY)
    golden = load_tensors(GOLDEN / "fp32" / "train_mixed.safetensors")
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("pos_embed.pos_embed"))
    out = model.forward_train(golden_train_batch(rows))
    torch.testing.assert_close(out.ce, golden["ce"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.mse, golden["mse"], atol=1e-6, rtol=1e-5)
    (out.ce.mean() + out.mse.mean()).backward()
    ours = {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = {name: g for name, g in golden.items() if name.startswith("grad.")}
    assert len(theirs) == 137 and theirs.keys() <= ours.keys()
    # A key bias shifts every score of a query alike, so its true gradient is zero: fp32 leaves noise there, hence the absolute floor.
    for name, g in theirs.items():
        assert (ours[name] - g).abs().max() <= 1e-5 * g.abs().max() + 5e-7, name
