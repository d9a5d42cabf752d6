"""The gate between stages: a student is passed on only if, by its own held-out measure, the stage made it better than it came in.

A distillation stage measures its student before the first step, on the same conditions and noises as in all later evaluations, and keeps
the best checkpoint. So the verdict is read from the run folder alone, and runs of one stage (the couplings of DMDO) can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hyperbagel.core.errors import InputError
from hyperbagel.core.run import read_metrics
from hyperbagel.train.checkpoint import best_checkpoint, best_score, read_best

SCORE_LOSS = 0.03  # ours: how much `score` a gain in reward may cost; if it costs more, the reward is being exploited


@dataclass(frozen=True)
class Verdict:
    """What the figures of a finished run say. `alarms`: those of the evaluation that its export was taken from."""

    run: Path
    measure: str
    start: float
    best: float
    step: int
    alarms: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Better than at the start, without collapse and without losing more score than a gain in reward may cost."""
        return self.step > 0 and self.best > self.start and not {"collapse", "score_lost"} & set(self.alarms)

    def __str__(self) -> str:
        why = f"{self.measure} {self.start:.4g} at the start, {self.best:.4g} at step {self.step}"
        told = f", alarms: {', '.join(self.alarms)}" if self.alarms else ""
        return f"{self.run}: {'passed' if self.passed else 'NOT passed on'} ({why}{told})"


def judge(run: Path) -> Verdict:
    """The verdict on a finished run. Raises InputError if it is not finished or was never measured."""
    best = best_checkpoint(run / "checkpoints")
    if best is None or not (run / "export").is_dir():
        raise InputError(
            f"{run}: got no finished run with a best checkpoint, expected export/ and checkpoints/best.json; train it to its end"
        )
    measure = str(read_best(run / "checkpoints").get("metric"))
    held_out = [line for line in read_metrics(run / "metrics.jsonl") if any(key.startswith("held_out/") for key in line)]
    if not held_out or held_out[0]["step"] != 0 or f"held_out/{measure}" not in held_out[0]:
        raise InputError(f"{run}: got no measure of the student before the first step, expected one; set held_out in the recipe")
    step = int(best.name.removeprefix("step-"))
    at = next((line for line in held_out if line["step"] == step), {})
    alarms = [k.removeprefix("held_out/alarm_") for k, v in at.items() if k.startswith("held_out/alarm_") and v]
    if measure == "reward" and at.get("held_out/score", 0.0) < held_out[0].get("held_out/score", 0.0) - SCORE_LOSS:
        alarms.append("score_lost")
    return Verdict(run, measure, held_out[0][f"held_out/{measure}"], best_score(run / "checkpoints"), step, tuple(sorted(alarms)))


def choose(runs: Sequence[Path]) -> tuple[Verdict | None, list[Verdict]]:
    """(the best of those that passed, all verdicts). Raises InputError as `judge` does, or if the runs have different measures."""
    verdicts = [judge(run) for run in runs]
    if len({v.measure for v in verdicts}) > 1:
        raise InputError(
            f"got runs measured by {', '.join(sorted({v.measure for v in verdicts}))}, expected one measure; compare like stages"
        )
    passed = [v for v in verdicts if v.passed]
    return (max(passed, key=lambda v: v.best) if passed else None), verdicts
