"""Trains the autoencoder on toybox pictures that are drawn during training. The first stage: every later one works on its latents.

Shape legend: B pictures, R x R pixels, Z latent channels, h = R / downsample.
"""

from __future__ import annotations

import multiprocessing
import random
from collections import OrderedDict
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from hyperbagel.core.config import Config
from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_path, make_folder
from hyperbagel.model.config import VaeConfig
from hyperbagel.model.vae import AttnBlock, AutoEncoder, Resample, ResBlock
from hyperbagel.model.weights import load_tensors, save_tensors
from hyperbagel.toybox.render import render
from hyperbagel.toybox.scene import sample_scenes
from hyperbagel.train.distributed import join_world
from hyperbagel.train.optim import OptimConfig
from hyperbagel.train.sheet import to_uint8, write_sheet
from hyperbagel.train.stage import HELD_OUT_SEED, Draws, Player, Stage, TrainRecipe


class Architecture(Config):
    """Sizes of an autoencoder of FLUX's kind; scale and shift of its latents are measured at the end."""

    downsample: int = 8
    ch: int = 16
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = Field(default=1, ge=1)
    z_channels: int = 16
    norm_groups: int = 8


class Recipe(TrainRecipe):
    """Settings of the stage "vae"."""

    resolution: int = Field(default=64, ge=16)
    batch_size: int = Field(default=16, ge=1)
    workers: int = Field(default=0, ge=0)  # processes that draw ahead; 0: draw in the training process
    variety: float = Field(default=0.25, ge=0, le=0.5)  # how often materials, styles and tones vary
    crowded: float = Field(default=0.6, ge=0, le=1)  # share of training scenes with four things: more to learn in each picture
    kl_weight: float = Field(default=1e-4, ge=0)  # per latent element, against losses per colour value
    latent_noise: float = Field(default=0.0, ge=0)  # standard deviation, in units of the batch's own latent deviation
    finest_from_step: int = Field(default=0, ge=0)  # until then the residual blocks at full resolution sleep: they cost most and add least
    held_out: int = Field(default=128, ge=1)  # pictures measured
    architecture: Architecture = Architecture()
    init: Path | None = None  # folder with ae.safetensors and vae_config.json to start from; `architecture` must match it
    freeze_encoder: bool = False  # train the decoder alone: latents stay the ones that later stages have learned
    optim: OptimConfig = OptimConfig(kind="muon", lr=0.02, ema_decay=0.998)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Recipe:
        a = self.architecture
        if a.downsample != 2 ** (len(a.ch_mult) - 1) or self.resolution % a.downsample:
            raise ValueError(f"resolution must be divisible by downsample, and downsample be {2 ** (len(a.ch_mult) - 1)} for these ch_mult")
        return self


def draw_pictures(seed: int, count: int, resolution: int, variety: float, crowded: float = 0.0, split: str = "train") -> np.ndarray:
    """uint8 [count, R, R, 3]: random scenes, a pure function of its arguments."""
    rng = random.Random(seed)
    scenes = sample_scenes(rng, count, crowded=crowded, split=split, variety=variety)
    return np.stack([render(scene, resolution) for scene in scenes])


def to_signed(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1]."""
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def initialise(model: AutoEncoder) -> None:
    """Initialise as a linear autoencoder that keeps its signal's scale: residual branches add nothing, and the main path neither shrinks
    nor grows it.

    ours: PyTorch's own initialisation shrinks the main path threefold at each convolution; 17 dB then take two to three times the steps.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(_of(module.bias))
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if name.endswith("conv1") else "linear")
    for module in model.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, AttnBlock):
            nn.init.zeros_(module.proj_out.weight)
        elif isinstance(module, Resample) and module.up:
            weight = module.conv.weight.data
            weight.mul_(0.5)
            weight[:, :, 1, 1] += 0.7 * torch.eye(len(weight))  # pass on what nearest-neighbour upsampling gave
    model.decoder.conv_out.weight.data.mul_(0.5)
    z = model.config.z_channels
    model.encoder.conv_out.weight.data[z:].mul_(0.1)
    _of(model.encoder.conv_out.bias).data[z:] = -2.0  # log variance: little noise at the start


def finest_blocks(model: AutoEncoder) -> list[ResBlock]:
    """The residual blocks of encoder and decoder that work at the pictures' own resolution."""
    return [m for level in (model.encoder.down[0], model.decoder.up[0]) for m in level.modules() if isinstance(m, ResBlock)]


def set_asleep(block: ResBlock, asleep: bool) -> None:
    """Asleep, a block computes its shortcut alone: what it computes anyway after `initialise`, in a fraction of the time."""
    block.__dict__.pop("forward", None)
    if asleep:
        shortcut = block.nin_shortcut
        # put straight into the instance's dictionary, it hides the class's method without being registered as a submodule
        block.__dict__["forward"] = (lambda x: x) if shortcut is None else shortcut.forward


def _of(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias


def kl_to_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) || N(0, 1)) per element: (mean^2 + e^logvar - 1 - logvar) / 2."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Decibels per picture [B] between uint8 pictures [B, 3, H, W]; the peak is 255, equal pictures give 99."""
    error = (a.float() - b.float()).square().mean(dim=(1, 2, 3)).clamp_min(255**2 * 10**-9.9)
    return 10 * torch.log10(255**2 / error)


class VaeStage(Stage):
    """One player, "vae"; loss = L1 + MSE + kl_weight KL."""

    best_metric = "psnr"

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device, self.rank = recipe, device, join_world(device).rank
        a = recipe.architecture
        config = VaeConfig(resolution=recipe.resolution, scale_factor=1.0, shift_factor=0.0, **a.model_dump())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = AutoEncoder(config)
            initialise(self.model)
        if recipe.init is not None:
            self._load(recipe.init)
        self.model.encoder.requires_grad_(not recipe.freeze_encoder)
        # channels last is the faster layout on a GPU, the slower one on a CPU where group norms dominate
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.model.to(device).to(memory_format=layout)  # type: ignore[call-overload]
        self.players = {"vae": Player.of(self.model, recipe.optim, ("encoder.conv_in", "decoder.conv_out"), ramp=recipe.init is None)}
        pictures = draw_pictures(HELD_OUT_SEED, recipe.held_out, recipe.resolution, recipe.variety, split="heldout")
        self.held_out = to_signed(pictures).to(device)
        self.pool = ProcessPoolExecutor(recipe.workers, mp_context=multiprocessing.get_context("spawn")) if recipe.workers else None
        self.ahead: OrderedDict[int, Future[np.ndarray]] = OrderedDict()

    def _load(self, folder: Path) -> None:
        """Weights, scale and shift of an exported autoencoder."""
        if self.recipe.finest_from_step:
            raise InputError(f"finest_from_step: got {self.recipe.finest_from_step} with init, expected 0, trained blocks cannot sleep")
        try:
            config = VaeConfig.model_validate_json((folder / "vae_config.json").read_text())
        except (OSError, ValidationError) as error:
            raise InputError(f"{folder}: got no readable vae_config.json, expected an exported autoencoder, check the path") from error
        shape = {"scale_factor", "shift_factor"}
        if config.model_dump(exclude=shape) != self.model.config.model_dump(exclude=shape):
            raise InputError(f"{folder}: got an autoencoder of another shape than the recipe's, set architecture and resolution to its own")
        self.model.config = config
        self.model.load_state_dict(load_tensors(folder / "ae.safetensors"))

    def batch(self, step: int, rng: Draws) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, R, R] in [-1, 1] and posterior noise [2, B, Z, h, h] (sampling, latent noise)."""
        r = self.recipe
        pictures = to_signed(self._pictures(rng.python.getrandbits(62), step))
        side = r.resolution // r.architecture.downsample
        eps = torch.randn(2, r.batch_size, r.architecture.z_channels, side, side, generator=rng.torch)
        return pictures.to(self.device), eps.to(self.device)

    def _pictures(self, seed: int, step: int) -> np.ndarray:
        """The pictures of `seed`. With workers, those of the next steps are ordered as well, by the seeds that `batch` will draw."""
        r = self.recipe
        if self.pool is None:
            return draw_pictures(seed, r.batch_size, r.resolution, r.variety, r.crowded)
        wanted = [seed]
        own = range(self.rank * r.accumulate, (self.rank + 1) * r.accumulate)  # this rank's micro-batches: see train.loop
        for future_step in range(step + 1, step + 1 + 2 * r.workers):
            wanted += [Draws.at(r.seed, future_step, micro).python.getrandbits(62) for micro in own]
        for key in wanted:
            if key not in self.ahead:
                self.ahead[key] = self.pool.submit(draw_pictures, key, r.batch_size, r.resolution, r.variety, r.crowded)
        return self.ahead.pop(seed).result()

    def loss(self, player: str, batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        for block in finest_blocks(self.model):
            set_asleep(block, step < self.recipe.finest_from_step)
        pictures, (eps, extra) = batch
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.recipe.freeze_encoder):
            mean, logvar = self.model.moments(pictures)
        mean, logvar = mean.float(), logvar.float().clamp(-30, 20)
        z = mean + torch.exp(0.5 * logvar) * eps
        if self.recipe.latent_noise:
            z = z + self.recipe.latent_noise * z.detach().std() * extra
        error = self.model.decode_raw(z).float() - pictures
        l1, mse, kl = error.abs().mean(), error.square().mean(), kl_to_normal(mean, logvar).mean()
        loss = l1 + mse + self.recipe.kl_weight * kl
        # PSNR for values in [0, 1]: there the squared error is a quarter of that in [-1, 1]
        return loss, {"l1": l1, "mse": mse, "kl": kl, "psnr": -10 * torch.log10(mse.detach() / 4)}

    def _reconstruct(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded pictures and raw latents with the averaged weights, the latents sampled as they are in use."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        shown, latents = [], []
        with self.players["vae"].averaged():
            for part in pictures.split(32):
                mean, logvar = self.model.moments(part)
                z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator).to(mean)
                shown.append(self.model.decode_raw(z).float())
                latents.append(z.float())
        return torch.cat(shown), torch.cat(latents)

    def evaluate(self, step: int) -> dict[str, float]:
        """Mean and 5th percentile of the held-out pictures' PSNR in dB, and the standard deviation of their raw latents."""
        shown, latents = self._reconstruct(self.held_out)
        values = psnr(to_uint8(shown), to_uint8(self.held_out))
        return {"psnr": values.mean().item(), "psnr_p5": values.quantile(0.05).item(), "latent_std": latents.std().item()}

    def sample(self, step: int, out: Path) -> None:
        """Held-out pictures above their reconstructions."""
        shown, _ = self._reconstruct(self.held_out[:12])
        write_sheet(out / f"step-{step:08d}.png", [self.held_out[:12], shown])

    def finish(self, out: Path) -> None:
        """export/: ae.safetensors and vae_config.json, with a measured scale and shift under which latents have mean 0 and deviation 1."""
        r, config = self.recipe, self.model.config
        if not r.freeze_encoder:  # else latents, scale and shift are the old ones
            pictures = draw_pictures(HELD_OUT_SEED + 1, 512, r.resolution, r.variety)
            _, latents = self._reconstruct(to_signed(pictures).to(self.device))
            config = config.model_copy(update={"scale_factor": 1 / latents.std().item(), "shift_factor": latents.mean().item()})
        make_folder(out)
        with atomic_path(out / "export") as folder, self.players["vae"].averaged():
            folder.mkdir()
            save_tensors(folder / "ae.safetensors", self.model.state_dict())
            (folder / "vae_config.json").write_text(config.model_dump_json(indent=2) + "\n")

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


def build(recipe: Recipe, device: torch.device) -> VaeStage:
    """The stage's entry point, called by name."""
    return VaeStage(recipe, device)
