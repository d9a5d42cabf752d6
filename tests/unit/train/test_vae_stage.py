"""The autoencoder stage: its pieces, and a short training that must learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hyperbagel.core.config import load_config
from hyperbagel.core.errors import InputError
from hyperbagel.model.config import VaeConfig
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import load_tensors
from hyperbagel.train.distributed import World
from hyperbagel.train.launch import run_training
from hyperbagel.train.sheet import encode_png, to_uint8
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages.vae import Recipe, build, draw_pictures, finest_blocks, kl_to_normal, psnr, set_asleep, to_signed

SMALL = [
    "resolution=16", "batch_size=4", "held_out=8", "architecture.downsample=4", "architecture.ch_mult=[1, 2, 2]", "architecture.ch=8",
    "device=cpu", "crowded=0", "optim.warmup_steps=5", "sample_every=1000", "evaluate_every=1000",
]  # fmt: skip


def test_kl_is_torchs_and_psnr_has_known_values() -> None:
    mean, logvar = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    want = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(kl_to_normal(mean, logvar), want, atol=1e-5)
    a = torch.zeros(2, 3, 4, 4)
    assert psnr(a, a + torch.tensor([0.0, 25.5]).view(2, 1, 1, 1)).tolist() == pytest.approx([99.0, 20.0], abs=1e-3)


def test_pictures_are_a_function_of_the_seed_and_survive_the_scale() -> None:
    a, b, c = (draw_pictures(seed, 3, 16, 0.25) for seed in (1, 1, 2))
    assert (a == b).all() and (a != c).any()
    assert a.shape == (3, 16, 16, 3)
    signed = to_signed(a)
    assert signed.shape == (3, 3, 16, 16) and signed.min() >= -1 and signed.max() <= 1
    assert (to_uint8(signed).permute(0, 2, 3, 1).numpy().astype(int) - a).__abs__().max() <= 1


def test_workers_draw_what_the_process_itself_would() -> None:
    alone = build(load_config(Recipe, None, SMALL), torch.device("cpu"))
    helped = build(load_config(Recipe, None, [*SMALL, "workers=1"]), torch.device("cpu"))
    try:
        for step in (0, 1, 5):  # 5 was not ordered ahead
            for mine, theirs in zip(alone.batch(step, Draws.at(0, step, 0)), helped.batch(step, Draws.at(0, step, 0))):
                assert torch.equal(mine, theirs)
    finally:
        helped.close()


def test_workers_draw_ahead_for_their_own_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperbagel.train.stages.vae.join_world", lambda device: World(1, 2))
    stage = build(load_config(Recipe, None, [*SMALL, "workers=1", "accumulate=2"]), torch.device("cpu"))
    try:
        for step in range(4):
            for micro in (2, 3):  # of rank 1
                stage.batch(step, Draws.at(0, step, micro))
                assert len(stage.ahead) <= 5  # two steps of two, and the second of this one
    finally:
        stage.close()


def test_noise_on_latents_is_in_units_of_their_own_deviation() -> None:
    stage = build(load_config(Recipe, None, [*SMALL, "latent_noise=0.5"]), torch.device("cpu"))
    pictures, (eps, extra) = stage.batch(0, Draws.at(0))
    mean, logvar = stage.model.moments(pictures)
    z = mean + (0.5 * logvar).exp() * eps
    with torch.no_grad():
        wanted = (stage.model.decode_raw(z + 0.5 * z.std() * extra) - pictures).abs().mean()
        assert stage.loss("vae", (pictures, (eps, extra)), 0)[1]["l1"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert z.std() < 0.9 or z.std() > 1.1


def test_a_sleeping_block_computes_what_it_did_at_the_start() -> None:
    stage = build(load_config(Recipe, None, SMALL), torch.device("cpu"))
    awake = stage.model.moments(stage.held_out)[0]
    names = set(stage.model.state_dict())
    for block in finest_blocks(stage.model):
        set_asleep(block, True)
    assert torch.equal(stage.model.moments(stage.held_out)[0], awake) and set(stage.model.state_dict()) == names
    with torch.no_grad():
        for block in finest_blocks(stage.model):
            block.conv2.bias.add_(1.0)
    asleep = stage.model.moments(stage.held_out)[0]
    for block in finest_blocks(stage.model):
        set_asleep(block, False)
    assert torch.equal(asleep, awake) and not torch.allclose(stage.model.moments(stage.held_out)[0], awake)


def test_short_training_learns_and_exports_a_normalised_autoencoder(tmp_path: Path) -> None:
    result = run_training("vae", None, [*SMALL, "max_steps=80", "optim.ema_decay=0.9", "finest_from_step=60"], tmp_path / "run")
    fresh = build(load_config(Recipe, None, SMALL), torch.device("cpu"))
    with torch.no_grad():
        assert result.metrics["psnr"] > fresh.evaluate(0)["psnr"] + 3
    config = VaeConfig(**json.loads((tmp_path / "run" / "export" / "vae_config.json").read_text()))
    model = AutoEncoder(config)
    model.load_state_dict(load_tensors(tmp_path / "run" / "export" / "ae.safetensors"))
    pictures = to_signed(draw_pictures(5, 64, 16, 0.25))
    with torch.no_grad():
        mean, _ = model.moments(pictures)
        z = model.encode(pictures, torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)))
        shown = model.decode(z)
    assert abs(z.mean().item()) < 0.1 and abs(z.std().item() - 1) < 0.1
    assert psnr(to_uint8(shown), to_uint8(pictures)).mean().item() == pytest.approx(result.metrics["psnr"], abs=2.0)
    sheet = np.asarray(Image.open(next((tmp_path / "run" / "samples").glob("*.png"))))
    assert sheet.shape == (2 * 18 + 2, 8 * 18 + 2, 3)

    again = ["init=" + str(tmp_path / "run" / "export"), "freeze_encoder=true", "max_steps=5", "optim.ema_decay=0.5"]
    run_training("vae", None, [*SMALL, *again], tmp_path / "decoder")
    old, new = (load_tensors(tmp_path / name / "export" / "ae.safetensors") for name in ("run", "decoder"))
    moved = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"decoder"}
    assert json.loads((tmp_path / "decoder" / "export" / "vae_config.json").read_text()) == config.model_dump(mode="json")


def test_png_is_read_back_exactly(tmp_path: Path) -> None:
    picture = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "a.png").write_bytes(encode_png(picture))
    assert (np.asarray(Image.open(tmp_path / "a.png")) == picture.numpy()).all()


def test_recipe_file_is_valid_and_mistakes_are_named(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[3] / "recipes" / "toybox" / "vae.yaml"
    assert load_config(Recipe, recipe).resolution == 64
    with pytest.raises(InputError, match=r"did you mean 'architecture\.ch_mult'"):
        run_training("vae", recipe, ["architecture.ch_mul=[1]"], tmp_path / "run")
    for wrong, words in (("resolution=66", "divisible"), (f"init={tmp_path}", "vae_config")):
        with pytest.raises(InputError, match=words):
            run_training("vae", recipe, [wrong, "finest_from_step=0", "device=cpu"], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="did you mean 'vae'"):
        run_training("vea", None, [], tmp_path / "run")


def test_the_average_is_measured_and_exported(tmp_path: Path) -> None:
    stage = build(load_config(Recipe, None, [*SMALL, "optim.ema_decay=0.9"]), torch.device("cpu"))
    player = stage.players["vae"]
    with torch.no_grad():
        for value in player.ema.shadow.values():
            value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
        found = stage.evaluate(0)
        stage.finish(tmp_path)
        for name, value in player.ema.shadow.items():
            player.parameters[name].copy_(value)
        assert found == pytest.approx(stage.evaluate(0))
    export = load_tensors(tmp_path / "export" / "ae.safetensors")
    assert all(torch.equal(export[name], value) for name, value in player.ema.shadow.items())
