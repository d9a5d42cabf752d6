"""Trains BAGEL itself: pictures from captions, edits and answers, in one sequence model. Every later stage starts from it.

The same code trains the embedded model from scratch and trains a BAGEL checkpoint further on data of one's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from hyperbagel.core.config import Config, refuse_unknown
from hyperbagel.core.errors import InputError
from hyperbagel.data.mixture import RowsConfig
from hyperbagel.data.packing import Encode
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.generate.session import Parts, image_transform
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig, BagelOptions, LLMConfig, ViTConfig
from hyperbagel.model.init import fresh_bagel, shrink_writes
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.model.student import generates
from hyperbagel.model.weights import stored_dtype
from hyperbagel.train.alignment import Aligner, Alignment
from hyperbagel.train.batches import Batches, NamedBatch
from hyperbagel.train.checkpoint import as_exported
from hyperbagel.train.compiled import compile_layers, uncompiled
from hyperbagel.train.distributed import World, join_world
from hyperbagel.train.folder import load_model, load_vae, load_vit, save_model
from hyperbagel.train.loop import pick_precision
from hyperbagel.train.losses.flow import flow_by_time, mixed_objective
from hyperbagel.train.optim import OptimConfig
from hyperbagel.train.previews import write_previews
from hyperbagel.train.stage import HELD_OUT_SEED, Draws, Player, Stage, TrainRecipe

_ENDS = ("language_model.lm_head", "vae2llm", "llm2vae", "time_embedder", "connector", "vit_model.vision_model.embeddings")


class Shape(Config):
    """A new model's shape. Unknown keys, which checkpoint files may have, are refused here. The VAE's shape comes from its own folder."""

    llm: LLMConfig = LLMConfig()
    vit: ViTConfig = ViTConfig()
    options: BagelOptions = BagelOptions()

    @field_validator("llm", "vit", "options", mode="before")
    @classmethod
    def _known(cls, value: Any, info: Any) -> Any:
        known: Any = cls.model_fields[info.field_name].annotation
        return value if known is None else refuse_unknown(known, value)


class Recipe(TrainRecipe):
    """Settings of the stage "base"."""

    init: Path | None = None  # a BAGEL folder to start from; None: a new model of `shape`
    shape: Shape = Shape()
    vae: Path | None = None  # folder with ae.safetensors; None: that of `init`
    vit: Path | None = None  # folder of a pretrained vision encoder (stage vit) to start with; None: that of `init`, else a new one
    tokenizer: Path | None = None  # folder with tokenizer.json; None: that of `init`, else the embedded model's
    frozen: tuple[str, ...] = ()  # parameters whose names begin with one of these are not trained
    freeze_understanding: bool = False  # train drawing alone: answers stay the same bit for bit, so drafters stay valid
    data: RowsConfig
    held_out: RowsConfig | None = None  # what is measured; its mixture is not used
    held_out_batches: int = Field(default=2, ge=1)  # of each held-out source
    shift: float = Field(default=1.0, gt=0)  # of the timesteps in training
    mse_weight: float = Field(default=1.0, ge=0)
    ce_weight: float = Field(default=1.0, ge=0)
    align: Alignment | None = None
    shrink: float = Field(default=1.0, gt=0)  # at the start, what the understanding layers write is divided by it: see model.init
    recompute: bool = False  # keep one tensor per layer and rerun layers for their gradients: more time, far less memory
    compile: bool = False  # decoder layers through inductor: twice as fast on a CPU with bf16 units, after a minute of compiling
    export_dtype: str = Field(default="bfloat16", pattern="^(bfloat16|float32)$")
    optim: OptimConfig = OptimConfig(lr=1e-3, ema_decay=0.999)


class BaseStage(Stage):
    """One player, "model"."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        source = recipe.vae or recipe.init
        if source is None:
            raise InputError("vae: got no folder, expected one with ae.safetensors, set vae=FOLDER or init=FOLDER")
        self.vae = load_vae(source, device)
        self.vae_dtype = stored_dtype(source, "ae") if recipe.vae is None else None  # of `init`: exported as it is stored
        self.tokenizer_folder = recipe.tokenizer or recipe.init or Path(__file__).parents[2] / "assets" / "toybox"
        tokenizer = Tokenizer.from_folder(self.tokenizer_folder)
        self.model = self._model()
        if tokenizer.largest_id >= (known := self.model.config.llm.vocab_size):
            raise InputError(
                f"{self.tokenizer_folder}: got a tokenizer with ids up to {tokenizer.largest_id}, expected below {known}; take the model's "
                "own, or raise shape.llm.vocab_size"
            )
        if recipe.vit is not None:
            self._take_vit(recipe.vit)
        if recipe.shrink != 1:
            shrink_writes(self.model, recipe.shrink)
        self._freeze()
        if recipe.init is not None and stored_dtype(recipe.init) == pick_precision(recipe.precision, device) == torch.bfloat16:
            hold_in_bf16(self.model)
        self.aligner = Aligner(recipe.align, self.model, device) if recipe.align else None
        # Muon is for the inner matrices: layers that read or write tokens, patches, latents and times are left to Adam
        both = nn.ModuleDict({"model": self.model, "projector": self.aligner.projector}) if self.aligner else self.model
        ends = (*(f"model.{end}" for end in _ENDS), "projector") if self.aligner else _ENDS
        fresh = recipe.init is None or recipe.shrink != 1 or recipe.vit is not None  # then the average should forget the start
        self.players = {"model": Player.of(both, recipe.optim, ends, ramp=fresh)}
        self.model.language_model.model.recompute = recipe.recompute
        if recipe.compile:
            compile_layers(self.model.language_model.model.layers)
        sizes = self.model.config.options
        self.parts = Parts(self.model, self.vae, tokenizer, image_transform(sizes.vae_transform), image_transform(sizes.vit_transform))
        self.batches = self._batches(recipe.data, recipe.seed, join_world(device), self.aligner.see if self.aligner else None)
        self.measured: list[NamedBatch] = []
        for data in recipe.held_out.single_sources() if recipe.held_out else []:
            batches = self._batches(data, HELD_OUT_SEED)
            self.measured += [batches.next(Draws.at(HELD_OUT_SEED, i)) for i in range(recipe.held_out_batches)]
            batches.close()
        self.best_metric = "score" if self.measured else None
        self.measures_start = bool(self.measured) and recipe.init is not None  # `init` is the first candidate: see train.gate

    def _batches(self, data: RowsConfig, seed: int, world: World | None = None, see: Encode | None = None) -> Batches:
        return Batches(
            data,
            self.model.config,
            self.parts.tokenizer,
            self.vae,
            seed=seed,
            device=self.device,
            shift=self.recipe.shift,
            world=world,
            see=see,
        )

    def _model(self) -> Bagel:
        r = self.recipe
        if r.init is not None:
            return load_model(r.init, self.device)
        config = BagelConfig(llm=r.shape.llm, vit=r.shape.vit, options=r.shape.options, vae=self.vae.config)
        return fresh_bagel(config, torch.Generator().manual_seed(r.seed)).to(self.device)

    def _freeze(self) -> None:
        """Apply `frozen` and `freeze_understanding`. Raises InputError for a prefix without parameters, or if nothing is left to train."""
        recipe = self.recipe
        names = [name for name, _ in self.model.named_parameters()]
        if strange := [prefix for prefix in recipe.frozen if not any(name.startswith(prefix) for name in names)]:
            raise InputError(f"frozen: got {strange[0]!r}, which no parameter's name begins with, expected a prefix such as vit_model")
        for name, parameter in self.model.named_parameters():
            if name.startswith(recipe.frozen) or (recipe.freeze_understanding and not generates(name)):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise InputError(f"frozen: got {', '.join(recipe.frozen)}, which covers the whole model, expected something left to train")

    def _take_vit(self, folder: Path) -> None:
        """Replace the model's vision encoder by a pretrained one. Raises InputError if its shape differs."""
        vit = load_vit(folder, self.device)
        new, own = vit.config, self.model.config.vit
        if new != own:
            changed = [f"{k} {v}, expected {getattr(own, k)}" for k, v in new.model_dump().items() if v != getattr(own, k)]
            raise InputError(f"vit={folder}: got an encoder with {'; '.join(changed)}; train it with the shape of this model's")
        self.model.vit_model.load_state_dict(vit.state_dict())

    def batch(self, step: int, rng: Draws) -> NamedBatch:
        return self.batches.next(rng)

    def loss(self, player: str, batch: NamedBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        r = self.recipe
        taps: list[Streams] | None = [] if self.aligner else None
        out = self.model.forward_train(batch.packed, taps=taps)
        loss, parts = mixed_objective(out.mse, out.ce, batch.packed.ce_weights, mse_weight=r.mse_weight, ce_weight=r.ce_weight)
        if self.aligner and taps and out.mse.numel():
            parts["align"] = self.aligner.loss(batch.packed, taps)
            loss = loss + self.aligner.config.weight * parts["align"]
        return loss, {f"{batch.source}_{name}": value for name, value in parts.items()}

    def evaluate(self, step: int) -> dict[str, float]:
        """Each source's held-out losses with the averaged weights; the flow loss also by quarters of t (0: clean, 3: noise). `score`: minus
        the weighted sum, as in training, of the mean flow loss and the mean answer loss over sources."""
        found: dict[str, list[float]] = {}
        with self.players["model"].averaged(), uncompiled():
            for batch in self.measured:
                out = self.model.forward_train(batch.packed)
                _, parts = mixed_objective(out.mse, out.ce, batch.packed.ce_weights)
                values = {name: value.item() for name, value in parts.items()}
                if out.mse.numel():
                    times = batch.packed.timesteps[batch.packed.mse_index]
                    values |= {f"mse_t{i}": v for i, v in enumerate(flow_by_time(out.mse, times).tolist()) if v == v}  # not the empty ones
                for name, value in values.items():
                    found.setdefault(f"{batch.source}_{name}", []).append(value)
        figures = {name: sum(values) / len(values) for name, values in found.items()}
        kinds = {kind: [value for name, value in figures.items() if name.endswith(f"_{kind}")] for kind in ("mse", "ce")}
        weights = {"mse": self.recipe.mse_weight, "ce": self.recipe.ce_weight}
        if self.measured:
            figures["score"] = -sum(weights[kind] * sum(values) / len(values) for kind, values in kinds.items() if values)
        return figures

    def sample(self, step: int, out: Path) -> None:
        """A sheet of the averaged model's pictures, edits and answers; of the toybox, so only where that is learnt."""
        if all(source.kind != "toybox" for source in self.recipe.data.sources.values()):
            return
        with self.players["model"].averaged(), uncompiled():
            write_previews(out / f"step-{step:08d}.png", self.parts, HELD_OUT_SEED)

    def state(self) -> dict[str, Any]:
        return self.batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.batches.load_state(state)

    def finish(self, out: Path) -> None:
        """export/: a whole model folder in BAGEL's layout, with the averaged weights of the best checkpoint or, if nothing was measured, of
        the last step."""
        with as_exported(self, "model", out):
            dtype = getattr(torch, self.recipe.export_dtype)
            save_model(out / "export", self.model, self.vae, self.tokenizer_folder, dtype, self.vae_dtype)

    def close(self) -> None:
        self.batches.close()


def hold_in_bf16(model: nn.Module) -> None:
    """Halve the memory of linear layers that are not trained: autocast multiplies in bf16 anyway, and weights that came in bf16 lose
    nothing. Norms and tables stay in fp32, as do the streams between layers."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not any(parameter.requires_grad for parameter in layer.parameters()):
            layer.to(torch.bfloat16)


def build(recipe: Recipe, device: torch.device) -> BaseStage:
    """The stage's entry point, called by name."""
    return BaseStage(recipe, device)
