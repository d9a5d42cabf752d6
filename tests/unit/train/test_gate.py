"""What is passed on from stage to stage, what raises an alarm, and where a finished student goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyperbagel import cli
from hyperbagel.core.errors import InputError
from hyperbagel.train.alarms import FALLING, alarms
from hyperbagel.train.gate import choose, judge

HEALTHY = {"diversity": 1.0, "spread": 1.0, "size": 1.0}


def finished(run: Path, scores: dict[int, float], measure: str = "score", **best: float) -> Path:
    """A run folder that says these held-out figures by step; `best`: more figures of its best evaluation."""
    top = max(scores, key=lambda step: scores[step])
    lines = [{"step": step, f"held_out/{measure}": score} for step, score in scores.items()]
    for line in lines:
        if line["step"] == top:
            line |= {f"held_out/{key}": value for key, value in best.items()}
    (run / "export").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": max(scores), "student/loss": 1.0}]))
    checkpoint = run / "checkpoints" / f"step-{top:08d}"
    checkpoint.mkdir(parents=True)
    (run / "checkpoints" / "best.json").write_text(json.dumps({"name": checkpoint.name, "score": scores[top], "metric": measure}))
    return run


def test_a_stage_passes_if_it_made_its_student_better(tmp_path: Path) -> None:
    better = judge(finished(tmp_path / "a", {0: -0.5, 100: -0.2, 200: -0.3}))
    assert better.passed and (better.start, better.best, better.step) == (-0.5, -0.2, 100)
    worse = judge(finished(tmp_path / "b", {0: -0.1, 100: -0.2}))
    assert not worse.passed and "NOT passed on" in str(worse)


def test_a_collapsed_student_does_not_pass_whatever_its_score(tmp_path: Path) -> None:
    verdict = judge(finished(tmp_path / "a", {0: -0.5, 100: -0.2}, alarm_collapse=1.0))
    assert verdict.alarms == ("collapse",) and not verdict.passed
    assert judge(finished(tmp_path / "b", {0: -0.5, 100: -0.2}, alarm_saturation=1.0)).passed  # told, and left to the reader


def test_a_reward_that_was_exploited_does_not_pass(tmp_path: Path) -> None:
    for name, score, passed in (("kept", -0.21, True), ("lost", -0.3, False)):
        run = finished(tmp_path / name, {0: 1.0, 50: 2.0}, "reward", score=score)
        first, *rest = (run / "metrics.jsonl").read_text().splitlines()
        (run / "metrics.jsonl").write_text("\n".join([json.dumps(json.loads(first) | {"held_out/score": -0.2}), *rest]) + "\n")
        assert judge(run).passed == passed


def test_the_best_of_several_runs_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [finished(tmp_path / name, {0: -0.5, 100: score}) for name, score in (("tdm", -0.3), ("paired", -0.6), ("independent", -0.2))]
    best, verdicts = choose(runs)
    assert best is not None and best.run == runs[2] and [v.passed for v in verdicts] == [True, False, True]
    assert cli.main(["gate", *map(str, runs)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(runs[2] / "export") and err.count("passed") == 3
    assert cli.main(["gate", str(runs[1]), "--else", "before"]) == 0
    assert capsys.readouterr().out.strip() == "before"
    assert cli.main(["gate", str(runs[1])]) == 3


def test_runs_that_say_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished run"):
        judge(tmp_path)
    with pytest.raises(InputError, match="before the first step"):
        judge(finished(tmp_path / "a", {100: -0.2}))
    with pytest.raises(InputError, match="expected one measure"):
        choose([finished(tmp_path / "b", {0: 0, 1: 1}), finished(tmp_path / "c", {0: 0, 1: 1}, "reward")])
    for i, content in enumerate(("{", "[]", "{}", '{"name": "step-00000001", "score": "high"}')):
        run = finished(tmp_path / f"damaged-{i}", {0: 0, 1: 1})
        (run / "checkpoints" / "best.json").write_text(content)
        with pytest.raises(InputError, match="damaged-"):
            judge(run)


def test_alarms() -> None:
    assert alarms(HEALTHY) == {}
    for change, name in (
        ({"diversity": 0.5}, "collapse"),
        ({"spread": 0.6}, "contraction"),
        ({"size": 1.2}, "saturation"),
        ({"size": 0.7}, "fading"),
    ):
        found = alarms(HEALTHY | change)
        assert list(found) == [name] and f"{next(iter(change.values())):.2f}" in found[name]
    assert "past_best" in alarms(HEALTHY, [-0.5, -0.1] + [-0.2] * FALLING)
    assert alarms(HEALTHY, [-0.5, -0.1] + [-0.2] * (FALLING - 1)) == {} == alarms(HEALTHY, [-0.9 + 0.01 * i for i in range(20)])
    assert "past_best" not in alarms(HEALTHY, [-0.1] * 20)  # level is not falling


def test_no_alarm_for_what_was_not_measured() -> None:
    assert alarms({}) == {} == alarms(HEALTHY, [-0.1] * FALLING), "and none without an evaluation before the last ones"
