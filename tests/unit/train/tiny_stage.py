"""A stage small enough to train in a test: two players, dropout, averages. As a script it trains until it is killed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from hyperbagel.core.run import RunFolder
from hyperbagel.train.distributed import World
from hyperbagel.train.loop import TrainResult, train
from hyperbagel.train.optim import OptimConfig
from hyperbagel.train.stage import Draws, Player, Stage, TrainRecipe


class TinyStage(Stage):
    """ "even" and "odd" take turns; both losses go through both modules, so routing is the loop's work."""

    best_metric = "score"

    def __init__(self, kind: str = "adamw", poison: int = -1) -> None:
        torch.manual_seed(3)
        self.even = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 4))
        self.odd = nn.Linear(4, 1)
        config = OptimConfig.model_validate({"kind": kind, "lr": 0.01, "warmup_steps": 3, "ema_decay": 0.9, "schedule": "constant"})
        self.players = {"even": Player.of(self.even, config), "odd": Player.of(self.odd, config)}
        self.poison, self.seen, self.touched = poison, 0, set[str]()

    def turn(self, step: int) -> str:
        return "even" if step % 2 == 0 else "odd"

    def batch(self, step: int, rng: Draws) -> Tensor:
        self.seen += 1
        x = torch.randn(5, 4, generator=rng.torch)
        return x * float("nan") if step == self.poison else x

    def loss(self, player: str, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        wants = {name for name, p in self.players.items() for q in p.parameters.values() if q.requires_grad}
        self.touched |= {f"{player}:{name}" for name in wants}
        out = self.odd(self.even(batch))
        return (out - batch[:, :1]).square().mean(), {"size": out.abs().mean()}

    def evaluate(self, step: int) -> dict[str, float]:
        return {"score": -abs(step - 7.0)}  # best at step 7, so that "best" differs from "newest"

    def state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run must agree on."""
        found = {}
        for name, p in self.players.items():
            found |= {f"{name}.{k}": v.detach() for k, v in p.parameters.items()}
            assert p.ema is not None
            found |= {f"{name}.ema.{k}": v for k, v in p.ema.shadow.items()}
            for key, q in p.parameters.items():
                found |= {f"{name}.{key}.{s}": torch.as_tensor(v) for s, v in p.optimizer.state[q].items()}
        return found


def run(
    folder: Path, steps: int, *, resume: bool = False, stage: TinyStage | None = None, world: World | None = None, **settings: object
) -> tuple[TinyStage, TrainResult]:
    """Train a tiny stage up to `steps` in `folder`."""
    stage = stage or TinyStage()
    values = {
        "device": "cpu",
        "precision": "fp32",  # runs are compared number by number: not what each process measures to be faster
        "max_steps": steps,
        "log_every": 1,
        "evaluate_every": 7,
        "sample_every": 1000,
        "checkpoint_every_seconds": 1e9,
    }
    recipe = TrainRecipe.model_validate(values | settings)
    leads = world is None or world.leads
    with RunFolder(folder, recipe, seed=recipe.seed, resume=resume, leads=leads) as opened:
        return stage, train(stage, recipe, opened, resume=resume, world=world)


if __name__ == "__main__":
    run(Path(sys.argv[1]), 1_000_000, resume=len(sys.argv) > 2, checkpoint_every_seconds=1e-9, keep=2)
