"""From a stage's name and a recipe to a finished run folder."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import pkgutil
from pathlib import Path

import torch

from hyperbagel.core.config import Config, load_config
from hyperbagel.core.errors import InputError
from hyperbagel.core.run import RunFolder, check_run_folder, check_stage, read_metrics
from hyperbagel.pipeline import model_folder
from hyperbagel.train import stages
from hyperbagel.train.checkpoint import list_checkpoints
from hyperbagel.train.distributed import join_world, leave_world
from hyperbagel.train.loop import TrainResult, pick_device, train
from hyperbagel.train.sharding import shard_stage
from hyperbagel.train.stage import Stage

log = logging.getLogger(__name__)


def stage_names() -> list[str]:
    """Stages that can be trained: the files of `train/stages/`."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(stages.__path__) if not m.name.startswith("_"))


def run_training(name: str, recipe: Path | None, overrides: list[str], out: Path, resume: bool = False) -> TrainResult:
    """Train stage `name` with `recipe` (YAML; None: the stage's defaults, or on resume the run's own settings) into the run folder `out`.

    Raises:
        InputError: unknown stage, bad recipe or override, or a folder that cannot be used.
        hyperbagel.train.loop.Diverged: a loss is not finite.
    """
    names = stage_names()
    if name.replace("_", "-") not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of these"
        raise InputError(f"stage: got {name!r}, expected one of {', '.join(names)}; {hint}")
    file = name.replace("-", "_")
    module = importlib.import_module(f"{stages.__name__}.{file}")
    if int(os.environ.get("RANK", 0)) == 0:  # the other ranks only read
        check_run_folder(out, resume=resume)
    if resume:
        check_stage(out, file)
        recipe = recipe or out / "config.yaml"
    settings = load_config(module.Recipe, recipe, overrides)
    resolve_models(settings)
    torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    world = join_world(device)
    stage: Stage | None = None
    try:
        with RunFolder(out, settings, seed=settings.seed, resume=resume, leads=world.leads) as run:
            try:
                stage = module.build(settings, device)  # may take minutes: stopped there, the run is one to resume
                if settings.shard and world.size > 1:
                    shard_stage(stage, world, settings.shard_above)
                return train(stage, settings, run, resume=resume, world=world)
            except KeyboardInterrupt:
                if stage is None and world.leads:
                    log.warning("%s: stopped before training began; the same command with --resume goes on", out)
                raise
            except Exception as error:
                # a mistake in the recipe, or in rows that cannot be used: the corrected command finds the folder free
                early = stage is None or isinstance(error, InputError)
                if early and world.leads and not resume and not _has_something(run):
                    run.discard()
                raise
    finally:
        if stage is not None:
            stage.close()
        leave_world()


def _has_something(run: RunFolder) -> bool:
    """Whether a run logged or stored a step beyond its start, or exported something."""
    steps = [line["step"] for line in read_metrics(run.metrics_path)] + [
        int(p.name.rpartition("-")[2]) for p in list_checkpoints(run.checkpoints)
    ]
    return max(steps, default=0) > 0 or (run.path / "export").exists()


def resolve_models(settings: Config) -> None:
    """Replace the name toybox, in a recipe too, by the shipped model's folder; the run's stored settings then name that folder."""
    for key in ("model", "target", "init", "init_base"):
        if getattr(settings, key, None) == Path("toybox"):
            setattr(settings, key, model_folder("toybox"))
