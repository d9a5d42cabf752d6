"""A run that was stopped, however rudely, goes on as if nothing had happened."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_stage import TinyStage, run

from hyperbagel.core.errors import InputError
from hyperbagel.core.run import read_metrics
from hyperbagel.train.checkpoint import Progress, best_checkpoint, list_checkpoints, load_checkpoint, note_best, save_checkpoint
from hyperbagel.train.distributed import World
from hyperbagel.train.loop import _Loop
from hyperbagel.train.stage import Draws, Player, TrainRecipe


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_n_plus_m_steps_equal_n_save_load_m(tmp_path: Path, kind: str, accumulate: int) -> None:
    whole, _ = run(tmp_path / "whole", 12, stage=TinyStage(kind), accumulate=accumulate)
    run(tmp_path / "parts", 5, stage=TinyStage(kind), accumulate=accumulate)
    torch.manual_seed(99)  # a fresh process has other generators
    parts, _ = run(tmp_path / "parts", 12, resume=True, stage=TinyStage(kind), accumulate=accumulate)
    assert whole.seen == parts.seen == 12 * accumulate
    a, b = whole.tensors(), parts.tensors()
    assert a.keys() == b.keys() and len(a) > 20
    for name in a:
        assert torch.equal(a[name], b[name]), name
    values = [
        [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(tmp_path / f / "metrics.jsonl")]
        for f in ("whole", "parts")
    ]
    logged = [[line for line in lines if "held_out/score" not in line] for lines in values]
    assert logged[0] == logged[1] and [line["step"] for line in logged[0]] == list(range(1, 13))


def test_training_moved_something(tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in TinyStage().even.state_dict().items()}
    after, _ = run(tmp_path / "run", 4)
    assert all(not torch.equal(before[k], v) for k, v in after.even.state_dict().items())


@pytest.mark.slow
def test_kill_9_never_harms_a_checkpoint(tmp_path: Path) -> None:
    """Three kills at different moments of a process that writes checkpoints all the time."""
    folder, script = tmp_path / "run", Path(__file__).with_name("tiny_stage.py")
    reached = 0
    for extra, wait in (([], 0.3), (["resume"], 0.17), (["resume"], 0.41)):
        child = subprocess.Popen([sys.executable, str(script), str(folder), *extra], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not any(int(p.name[5:]) > reached for p in list_checkpoints(folder / "checkpoints")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.wait()
        found = list_checkpoints(folder / "checkpoints")
        stage = TinyStage()
        for path in found:
            load_checkpoint(path, stage)
        newest = int(found[-1].name[5:])
        assert newest > reached
        reached = newest
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line["step"] for line in lines if "held_out/score" not in line]
    assert steps == sorted(set(steps)) and steps[0] == 1
    resumed, _ = run(folder, reached + 3, resume=True)
    unbroken, _ = run(tmp_path / "unbroken", reached + 3)
    for name, value in unbroken.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name


def test_metrics_beyond_the_checkpoint_are_dropped_and_a_cut_line_is_not_read(tmp_path: Path) -> None:
    run(tmp_path / "run", 5)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "even/loss": 1.0}\n{"step": 7, "even/lo')
    run(tmp_path / "run", 6, resume=True)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "odd/loss" in line or "even/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1] != {"step": 6, "even/loss": 1.0}


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    stage = TinyStage()
    for step in range(1, 12):
        save_checkpoint(tmp_path, stage, Progress(step, 0.0), keep=2, score=stage.evaluate(step)["score"])
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000007", "step-00000010", "step-00000011"]
    best = best_checkpoint(tmp_path)
    assert best is not None and best.name == "step-00000007"


def test_half_written_checkpoints_are_not_seen_and_go_at_the_next_save(tmp_path: Path) -> None:
    stage = TinyStage()
    path = save_checkpoint(tmp_path, stage, Progress(1, 0.0), keep=2)
    shutil.copytree(path, tmp_path / ".step-00000002.tmp-0123abcd")
    (tmp_path / "step-00000003").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001"]
    save_checkpoint(tmp_path, stage, Progress(4, 0.0), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000004"]


def test_a_checkpoint_holds_no_pickle_and_damage_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, TinyStage(), Progress(1, 0.0), keep=2)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    weights = path / "even.weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged checkpoint"):
        load_checkpoint(path, TinyStage())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, TinyStage(), Progress(1, 0.0), keep=2)
    other = TinyStage()
    other.even.append(torch.nn.Linear(4, 4))
    other.players["even"].optimizer.add_param_group({"params": list(other.even[-1].parameters())})
    with pytest.raises(InputError, match=r"'3\.bias'"):
        load_checkpoint(path, other)


def test_not_a_number_stops_with_the_last_good_state(tmp_path: Path) -> None:
    from hyperbagel.train.loop import Diverged

    with pytest.raises(Diverged, match="step 6: got nan for the loss of player 'even'"):
        run(tmp_path / "run", 12, stage=TinyStage(poison=6))
    good, _ = run(tmp_path / "good", 6)
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    stage = TinyStage()
    assert load_checkpoint(newest, stage).step == 6
    for name, value in good.tensors().items():
        assert torch.equal(value, stage.tensors()[name]), name


@pytest.mark.parametrize("every", [1e9, 1e-9])
def test_a_resume_never_meets_a_refused_batch_again(tmp_path: Path, every: float) -> None:
    """Also where the step at which it stopped had a checkpoint already (every=1e-9: each step has), and where the next batch is bad too."""
    from hyperbagel.train.loop import Diverged

    class Bad(TinyStage):
        refused = 0

        def batch(self, step: int, rng: Draws) -> torch.Tensor:
            x = super().batch(step, rng)
            return x * float("nan") if self.seen in (8, 9, 12) else x

        def refuse(self) -> None:
            self.refused += 1

    drawn: list[torch.Tensor] = []

    class Noting(Bad):
        def batch(self, step: int, rng: Draws) -> torch.Tensor:
            drawn.append(torch.randn((), generator=rng.torch.clone_state()))
            return super().batch(step, rng)

    for launch, step in enumerate((7, 7, 9)):
        stage = Noting()
        with pytest.raises(Diverged, match=f"step {step}: got nan"):
            run(tmp_path / "run", 14, resume=launch > 0, stage=stage, checkpoint_every_seconds=every)
        assert stage.refused == 1
    stage, _ = run(tmp_path / "run", 14, resume=True, stage=Noting(), checkpoint_every_seconds=every)
    assert stage.seen == 14 + 3
    assert len({x.item() for x in drawn}) == 17  # what follows a refused batch is drawn anew
    state = json.loads((list_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.json").read_text())
    assert state["step"] == 14 and state["refused"] == 0


def test_a_score_that_comes_after_the_checkpoint_is_kept_in_it(tmp_path: Path) -> None:
    """The last step is saved by the clock, and evaluated then: a kill before best.json must not lose its score."""
    stage = TinyStage()
    path = save_checkpoint(tmp_path, stage, Progress(7, 1.0), keep=2)
    before = json.loads((path / "state.json").read_text())
    save_checkpoint(tmp_path, stage, Progress(7, 2.0), keep=2, score=0.5)
    assert json.loads((path / "state.json").read_text()) == before | {"score": 0.5}
    save_checkpoint(tmp_path, stage, Progress(7, 3.0), keep=2, score=0.9)  # the same weights have one score
    assert json.loads((path / "state.json").read_text())["score"] == 0.5


def test_best_is_found_again_after_a_kill_before_it_was_noted(tmp_path: Path) -> None:
    run(tmp_path / "run", 7)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "best.json").unlink()
    run(tmp_path / "run", 30, resume=True, keep=1, evaluate_every=7)
    best = best_checkpoint(checkpoints)
    assert best is not None and best.name == "step-00000007" and len(list_checkpoints(checkpoints)) == 2


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"{}", b'{"players": null}'])
def test_a_damaged_state_is_named(tmp_path: Path, content: bytes) -> None:
    path = save_checkpoint(tmp_path, TinyStage(), Progress(1, 0.0), keep=2)
    (path / "state.json").write_bytes(content)
    with pytest.raises(InputError, match="step-00000001"):
        load_checkpoint(path, TinyStage())


def test_a_resume_that_is_refused_leaves_the_settings_alone(tmp_path: Path) -> None:
    run(tmp_path / "run", 2)
    before = (tmp_path / "run" / "config.yaml").read_text()
    other = TinyStage()
    other.odd = torch.nn.Linear(5, 1)
    other.players["odd"] = Player.of(other.odd, other.players["odd"].optim)
    with pytest.raises(InputError, match="resume with the recipe of this run"):
        run(tmp_path / "run", 4, resume=True, stage=other, log_every=9)
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    run(tmp_path / "run", 4, resume=True)


def test_figures_are_means_over_the_batches_that_have_them(tmp_path: Path) -> None:
    class Two(TinyStage):
        def loss(self, player: str, batch: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss, _ = super().loss(player, batch, step)
            self.calls = getattr(self, "calls", 0) + 1
            return loss, {"a" if self.calls % 4 else "b": torch.tensor(0.5 + self.calls % 4)}

    run(tmp_path / "run", 2, stage=Two(), accumulate=4)
    for line in read_metrics(tmp_path / "run" / "metrics.jsonl")[:2]:
        figures = {key.split("/")[-1]: value for key, value in line.items()}
        assert figures["a"] == 2.5 and figures["b"] == 0.5


def test_warm_up_counts_the_players_own_steps(tmp_path: Path) -> None:
    """Also of one that waits for others first, and over a resume."""

    class Late(TinyStage):
        def turn(self, step: int) -> str:
            return "even" if step < 6 else "odd"

    run(tmp_path / "run", 8, stage=Late())
    run(tmp_path / "run", 12, resume=True, stage=Late())
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "odd/lr" in line]
    assert [line["odd/lr"] for line in lines] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_a_batch_that_teaches_nothing_is_refused(tmp_path: Path) -> None:
    class Frozen(TinyStage):
        def loss(self, player: str, batch: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return batch.square().mean(), {"questions_ce": batch.mean()}

    with pytest.raises(InputError, match=r"nothing can be learnt from \(questions_ce\)"):
        run(tmp_path / "run", 2, stage=Frozen())


def test_only_the_player_whose_turn_it_is_wants_gradients(tmp_path: Path) -> None:
    stage, _ = run(tmp_path / "run", 4)
    assert stage.touched == {"even:even", "odd:odd"}


def test_clock_ends_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    _, result = run(tmp_path / "run", 10**9, max_seconds=0.3)
    assert 0 < result.step < 10**9
    state = json.loads((list_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.json").read_text())
    assert state["step"] == result.step and 0.3 <= state["seconds"] < 10
    _, again = run(tmp_path / "run", 10**9, resume=True, max_seconds=0.3)
    assert again.step == result.step  # the time was used up already


def test_run_folders_are_not_overwritten_and_not_resumed_from_nothing(tmp_path: Path) -> None:
    run(tmp_path / "run", 1)
    with pytest.raises(InputError, match="holds a run"):
        run(tmp_path / "run", 1)
    with pytest.raises(InputError, match="no run to resume"):
        run(tmp_path / "none", 1, resume=True)


def test_a_checkpoint_that_does_not_fit_is_told_in_a_line(tmp_path: Path) -> None:
    """A full disk says so through safetensors, in its own words; the checkpoint before stays."""
    kept = save_checkpoint(tmp_path, TinyStage(), Progress(1, 0.0), keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, limits[1]))
    try:
        with pytest.raises(InputError, match="raise the limit"):
            save_checkpoint(tmp_path, TinyStage(), Progress(2, 0.0), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list_checkpoints(tmp_path) == [kept]


def test_no_two_ranks_draw_the_same_batch() -> None:
    drawn = set()
    for rank in range(2):
        loop = _Loop.__new__(_Loop)
        loop.recipe, loop.world, loop.step, loop.refused = TrainRecipe(accumulate=2), World(rank, 2), 3, 0
        drawn |= {loop.draws(micro).python.random() for micro in range(2)}
    assert len(drawn) == 4


def test_a_checkpoint_between_two_evaluations_has_no_score(tmp_path: Path) -> None:
    run(tmp_path / "run", 9, checkpoint_every_seconds=1e-9, keep=9)
    states = [json.loads((path / "state.json").read_text()) for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    scores = {state["step"]: state["score"] for state in states}
    assert scores[7] == 0 and scores[6] is scores[8] is None


def test_of_equal_scores_the_first_is_the_best(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, TinyStage(), Progress(step, 0.0), keep=2, score=0.5)
    note_best(tmp_path, TinyStage())  # as a resume does
    best = best_checkpoint(tmp_path)
    assert best is not None and best.name == "step-00000001"
