"""The one training loop: turn, zero, backward, clip, step, average, log, evaluate, checkpoint. It never asks which stage it runs."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.core.hardware import fast_bf16
from hyperbagel.core.progress import ProgressReport
from hyperbagel.core.run import RunFolder
from hyperbagel.train.checkpoint import (
    Progress,
    best_score,
    list_checkpoints,
    load_checkpoint,
    note_best,
    save_checkpoint,
    trained_tensors,
)
from hyperbagel.train.distributed import World
from hyperbagel.train.optim import lr_factor, set_lr
from hyperbagel.train.sharding import clip_gradients
from hyperbagel.train.stage import Draws, Metrics, Stage, TrainRecipe

log = logging.getLogger(__name__)


class Diverged(FloatingPointError):
    """A loss or gradient norm is not finite. The last good state has been saved."""


@dataclass(frozen=True)
class TrainResult:
    """Where training ended, and the figures of its last evaluation."""

    step: int
    seconds: float
    metrics: dict[str, float]


def pick_device(name: str) -> torch.device:
    """The device of a recipe's `device`; "auto" is CUDA if available. Under torchrun a rank gets its own GPU, so weights are loaded there.

    Raises InputError if CUDA is asked for and not available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: got 'cuda', expected a CUDA device on this machine, use device=cpu or device=auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a recipe's `precision`; "auto" is bf16 on CUDA, and on CPUs where it was measured to be faster than fp32."""
    if name == "auto":
        name = "bf16" if fast_bf16(device) else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def train(
    stage: Stage,
    recipe: TrainRecipe,
    run: RunFolder,
    *,
    resume: bool = False,
    clock: Callable[[], float] = time.monotonic,
    world: World | None = None,
) -> TrainResult:
    """Train until `max_steps` or `max_seconds`, whichever comes first; checkpoint at the end.

    In the main thread, the first SIGINT or SIGTERM ends training after the current step, with a checkpoint; a second one ends it at once.
    (A rank that is waiting for others handles no signals: it ends when they arrive, or by SIGKILL.)
    On a CPU with schedule_by "steps", a resumed run equals an unbroken one bit for bit.

    Raises:
        Diverged: a loss or gradient norm is not finite; the weights before that step are saved, a resume goes on with the next batch.
        InputError: a checkpoint cannot be read or written.
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came, and the checkpoint is written; if one of several ranks got it, all stop.
    """
    return _Loop(stage, recipe, run, clock, world or World()).go(resume)


class _Signals:
    """Inside, the first SIGINT or SIGTERM is only remembered; a second one does what it would do outside."""

    TWICE = 1.0  # seconds within which a second signal may be the same one: torchrun forwards what SLURM or a shell has sent to ranks too

    def __init__(self, ranks: int) -> None:
        self.ranks, self.number, self.at = ranks, 0, 0.0
        self.usual: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            # None: a handler that was not set from Python; SIG_IGN: a background job of a shell. Both stay as they are.
            self.usual = {number: usual for number, usual in found.items() if usual not in (None, signal.SIG_IGN)}
            for number in self.usual:
                signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: object) -> None:
        if not self.number:
            self.number, self.at = number, time.monotonic()
        elif self.ranks == 1 or time.monotonic() - self.at > self.TWICE:
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *_: object) -> None:
        for number, usual in self.usual.items():
            signal.signal(number, usual)

    def leave(self) -> None:
        """End with the exit status of such a signal, 130 for SIGINT and 143 for SIGTERM; also on ranks that did not get it themselves."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def _unseen_by_workers() -> Iterator[None]:
    """Worker processes started inside never see SIGINT and SIGTERM: a terminal, `timeout` or a cluster sends these to the whole process
    group, but the current step still needs its workers. The pool ends them through its queue."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Loop:
    def __init__(self, stage: Stage, recipe: TrainRecipe, run: RunFolder, clock: Callable[[], float], world: World) -> None:
        self.stage, self.recipe, self.run, self.clock, self.world = stage, recipe, run, clock, world
        self.device = pick_device(recipe.device)
        if self.device.type == "cuda":  # cuDNN's attention takes a tenth of a second to plan each new shape, and rows of text always differ
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.dtype = pick_precision(recipe.precision, self.device)
        self.step = 0
        self.refused = 0  # batches of this step that gave no finite loss
        self.turns: Counter[str] = Counter()  # steps of each player so far
        self.before = 0.0  # seconds trained by earlier launches
        self.began = clock()
        self.seconds = 0.0  # trained so far, by rank 0's clock, so that all ranks decide alike
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})  # (step, figures) of the last evaluation
        self.drawn = -1  # step of the last sheet
        self.first = True  # no batch has been made yet

    def share(self, by_time: bool) -> float:
        """Progress in [0, 1]: by time (if the recipe has max_seconds) or by steps."""
        if by_time and self.recipe.max_seconds:
            return min(1.0, self.seconds / self.recipe.max_seconds)
        return self.step / max(1, self.recipe.max_steps)

    def go(self, resume: bool) -> TrainResult:
        with _Signals(self.world.size) as signals:
            return self._go(resume, signals)

    def _go(self, resume: bool, signals: _Signals) -> TrainResult:
        r, stopped = self.recipe, False
        self.prepare(resume)
        logged_at, saved_at = (self.clock(), self.step), self.clock()
        with ProgressReport(type(self.stage).__name__) as report:
            if self.stage.measures_start and self.works and best_score(self.run.checkpoints) == -math.inf and self.step == 0:
                report.line("measuring what comes in, before the first step")
                report.line(_show(0, self.evaluate()))
                self.save()
            while not stopped and self.step < r.max_steps and self.time_is_left():
                values = self.one_step()
                self.step += 1
                stopped = not self.world.all(not signals.number)
                if not self.works:
                    continue
                if report.due:  # reading the numbers waits for the device
                    report.update(max(self.share(True), self.share(False)), _show(self.step, values))
                if self.step % r.log_every == 0 and self.world.leads:
                    now = self.clock()
                    rate = (self.step - logged_at[1]) / max(1e-9, now - logged_at[0])
                    logged_at = (now, self.step)
                    self.run.log(self.step, _numbers(values) | {"steps_per_second": rate, "seconds": self.seconds})
                if stopped:  # start nothing that takes long
                    break
                if self.step % r.evaluate_every == 0:
                    report.line(_show(self.step, self.evaluate()))
                    if self.decide(self.is_best()):
                        self.save()
                        saved_at = self.clock()
                if self.step % r.sample_every == 0:
                    self.sample()
                if self.decide(self.clock() - saved_at >= r.checkpoint_every_seconds):
                    self.save()
                    saved_at = self.clock()
            if self.works:
                if not stopped:
                    report.line("done: " + _show(self.step, self.evaluate()))
                path = self.save()
            if not self.world.all(not signals.number):  # a point that all ranks reach: the first process to end takes the others with it
                if self.world.leads:
                    report.line(f"stopped after step {self.step}, saved in {path}; the same command with --resume goes on from there")
                signals.leave()
            if self.works:
                with torch.no_grad():
                    self.stage.finish(self.run.path)
                self.sample()  # last: a sheet that cannot be drawn must not cost the run
        self.world.wait()
        return TrainResult(self.step, self.seconds, self.evaluated[1])

    def prepare(self, resume: bool) -> None:
        """Threads, seeds and, on a resume, the newest checkpoint; then the same weights on every rank."""
        torch.set_num_threads(self.recipe.threads)
        torch.manual_seed(self.recipe.seed)  # for dropout; batches and losses draw from Draws
        if resume and (found := list_checkpoints(self.run.checkpoints)):
            progress = load_checkpoint(found[-1], self.stage)
            self.step, self.before, self.refused = progress.step, progress.seconds, progress.refused
            self.turns.update(self.stage.turn(step) for step in range(self.step))
        for player in self.stage.players.values():
            self.world.share(trained_tensors(player).values())
        if resume and self.world.leads:  # only now: a resume that is refused leaves the run as it was
            self.run.rewind(self.step)
            note_best(self.run.checkpoints, self.stage)

    @property
    def works(self) -> bool:
        """Whether this rank takes part in evaluations and checkpoints: only the leading one, or all if each holds a part of the weights."""
        return self.world.leads or self.stage.sharded

    def decide(self, flag: bool) -> bool:
        """`flag`; rank 0's, if all ranks must take part in what follows."""
        return bool(self.world.agree(flag)[0]) if self.stage.sharded else flag

    def time_is_left(self) -> bool:
        """Whether `max_seconds` allows another step; reads the clock."""
        [self.seconds] = self.world.agree(self.before + self.clock() - self.began)
        return not self.recipe.max_seconds or self.seconds < self.recipe.max_seconds

    def one_step(self) -> Metrics:
        """One optimiser step of the player whose turn it is."""
        r, name = self.recipe, self.stage.turn(self.step)
        player = self.stage.players[name]
        for other, p in self.stage.players.items():
            for parameter in p.parameters.values():
                parameter.requires_grad_(other == name)
        lr = player.optim.lr * lr_factor(player.optim, self.turns[name], self.share(player.optim.schedule_by == "time"))
        set_lr(player.optimizer, lr)
        player.optimizer.zero_grad(set_to_none=True)
        logged: dict[str, list[Any]] = {}
        losses = []
        for micro in range(r.accumulate):
            with _unseen_by_workers() if self.first else nullcontext():  # a loader starts its workers with its first batch
                batch = self.stage.batch(self.step, self.draws(micro))
            self.first = False
            with self.autocast():
                loss, metrics = self.stage.loss(name, batch, self.step)
            if not loss.requires_grad:
                raise InputError(
                    f"step {self.step}: got a batch that nothing can be learnt from ({', '.join(metrics)}), expected one with something "
                    f"that player {name!r} trains; leave that source out of the mixture, or freeze less"
                )
            losses.append((loss.detach(), metrics))
            (loss / r.accumulate).backward()
            for key, value in {"loss": self.world.mean(loss), **metrics}.items():
                logged.setdefault(key, []).append(value.detach() if isinstance(value, Tensor) else value)
        means = {key: sum(found) / len(found) for key, found in logged.items()}  # a batch only logs its own source
        self.world.average_gradients(list(player.parameters.values()))
        clip = clip_gradients if self.stage.sharded else torch.nn.utils.clip_grad_norm_
        norm = clip(list(player.parameters.values()), player.optim.clip)
        for loss, metrics in losses:  # only now: reading a number waits for the device
            self.check(loss, f"the loss of player {name!r}", metrics)
        self.check(norm, f"the gradient norm of player {name!r}", means)
        player.optimizer.step()
        self.turns[name] += 1
        self.refused = 0
        if player.ema is not None:
            player.ema.update(player.parameters)
        return {f"{name}/{key}": value for key, value in means.items()} | {f"{name}/grad_norm": norm, f"{name}/lr": lr}

    def draws(self, micro: int) -> Draws:
        """Generators for a batch of the current step; other ones after each batch of it that gave no finite loss."""
        key = (self.recipe.seed, self.step, self.world.rank * self.recipe.accumulate + micro)
        return Draws.at(*key, self.refused) if self.refused else Draws.at(*key)

    def check(self, value: Tensor, what: str, metrics: Metrics) -> None:
        """Raise Diverged if a number is not finite. No optimiser has moved in this step yet, so the weights are still good."""
        if self.world.all(math.isfinite(value.item())):
            return
        self.refused += 1
        self.stage.refuse()
        path = self.save() if self.works else self.run.checkpoints
        self.world.wait()  # the first process to end takes the others with it, even one that is still writing
        raise Diverged(
            f"step {self.step}: got {value.item()} for {what} ({_show(self.step, metrics)}), expected a finite number, "
            f"lower the learning rate or use precision=fp32; the weights before this step are in {path}, and a resume goes on "
            "with the next batch"
        )

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def evaluate(self) -> dict[str, float]:
        """Held-out figures of the current step, computed once."""
        if self.evaluated[0] != self.step:
            with torch.no_grad(), self.autocast():
                values = _numbers(self.stage.evaluate(self.step))
            self.evaluated = (self.step, values)
            if values and self.world.leads:
                self.run.log(self.step, {f"held_out/{key}": value for key, value in values.items()})
        return self.evaluated[1]

    def sample(self) -> None:
        """Draw the sheet of the current step, once. One that does not fit the memory is left out."""
        if self.drawn == self.step:
            return
        self.drawn = self.step
        try:
            with torch.no_grad(), self.autocast():
                self.stage.sample(self.step, self.run.folder("samples"))
        except torch.OutOfMemoryError as error:
            if self.stage.sharded:  # the other ranks would wait for this one's part of the weights
                raise
            log.warning("step %d: no sample sheet, it took too much memory (%s)", self.step, str(error).partition(". ")[0])

    @property
    def score(self) -> float | None:
        """The stage's `best_metric` at the current step, if it has been evaluated."""
        best = self.stage.best_metric
        return self.evaluated[1].get(best) if best and self.evaluated[0] == self.step else None

    def is_best(self) -> bool:
        return self.score is not None and self.score > best_score(self.run.checkpoints)

    def save(self) -> Path:
        progress = Progress(self.step, self.seconds, self.refused)
        return save_checkpoint(self.run.checkpoints, self.stage, progress, keep=self.recipe.keep, score=self.score, world=self.world)


def _numbers(values: Metrics) -> dict[str, float]:
    return {key: float(value) for key, value in values.items()}


def _show(step: int, values: Metrics) -> str:
    parts: Iterable[str] = (
        f"{key.split('/')[-1]} {float(value.detach() if isinstance(value, Tensor) else value):.4g}" for key, value in values.items()
    )
    return f"step {step}  " + "  ".join(parts)
