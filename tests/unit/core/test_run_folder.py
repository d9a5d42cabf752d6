"""The run folder's records and the progress report."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest

from hyperbagel.core.config import Config
from hyperbagel.core.errors import InputError
from hyperbagel.core.progress import ProgressReport, format_seconds
from hyperbagel.core.run import RunFolder, git_sha, read_metrics


class Settings(Config):
    rate: float = 0.5


def test_provenance_tells_every_launch(tmp_path: Path) -> None:
    """A resumed one from when it goes on: one that is refused before leaves the run's settings alone."""
    for resume in (False, True):
        with RunFolder(tmp_path / "run", Settings(), seed=7, resume=resume) as run:
            if resume:
                run.rewind(0)
    with RunFolder(tmp_path / "run", Settings(rate=9.0), seed=7, resume=True):
        pass
    launches = json.loads((tmp_path / "run" / "provenance.json").read_text())["launches"]
    assert len(launches) == 2
    assert launches[0]["seed"] == 7 and launches[0]["settings"] == {"rate": 0.5} and "torch" in launches[0]["versions"]
    assert (tmp_path / "run" / "config.yaml").read_text() == "rate: 0.5\n"


def test_damaged_records_are_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", Settings(), seed=7) as run:
        run.log(1, {"loss": 1.0})
    run.metrics_path.write_text("{nothing\n")
    with pytest.raises(InputError, match="got a damaged line"):
        read_metrics(run.metrics_path)
    for content in ("{", "[]", "{}"):
        (tmp_path / "run" / "provenance.json").write_text(content)
        with pytest.raises(InputError, match="restore"):
            RunFolder(tmp_path / "run", Settings(), seed=7, resume=True)


def test_metrics_lines_and_rewind(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", Settings(), seed=0) as run:
        for step in (1, 2, 3):
            run.log(step, {"loss": step / 2, "odd": float("nan")})
    assert read_metrics(run.metrics_path)[2] == {"step": 3, "loss": 1.5, "odd": None}
    with RunFolder(tmp_path / "run", Settings(), seed=0, resume=True) as run:
        run.rewind(2)
        run.log(3, {"loss": 9.0})
    assert [line["loss"] for line in read_metrics(run.metrics_path)] == [0.5, 1.0, 9.0]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_plain_progress_lines_are_spaced_in_time() -> None:
    now, stream = [0.0], io.StringIO()
    with ProgressReport("job", every=10, stream=stream, clock=lambda: now[0]) as report:
        for second in range(31):
            now[0] = float(second)
            report.update(second / 60, f"step {second}")
    lines = stream.getvalue().splitlines()
    assert [line.split()[-1] for line in lines] == ["0", "10", "20", "30"]
    assert "0:30 passed, 0:30 left" in lines[-1]


def test_format_seconds() -> None:
    assert [format_seconds(s) for s in (9.9, 309, 3909)] == ["0:09", "5:09", "1:05:09"]


def test_an_open_run_folder_is_of_one_alone(tmp_path: Path) -> None:
    """Others may look on; one that could not be opened is not held."""
    path = tmp_path / "run"
    with RunFolder(path, Settings(), seed=7):
        for resume in (True, False):
            with pytest.raises(InputError, match=r"another process is writing|holds a run"):
                RunFolder(path, Settings(), seed=7, resume=resume)
        RunFolder(path, Settings(), seed=7, resume=True, leads=False).close()
        with pytest.raises(InputError, match=r"run: got a run that another process is writing.*give another folder"):
            RunFolder(path, Settings(), seed=7, resume=True)
    with RunFolder(path, Settings(), seed=7, resume=True):
        pass


def test_the_time_left_of_a_resumed_job_is_read_off_what_this_launch_did() -> None:
    now, stream = [0.0], io.StringIO()
    with ProgressReport("job", every=10, stream=stream, clock=lambda: now[0]) as report:
        for second, share in ((0.0, 0.5), (10.0, 0.6)):
            now[0] = second
            report.update(share)
    first, second = stream.getvalue().splitlines()
    assert "time left unknown" in first and "0:10 passed, 0:40 left" in second


def test_what_came_before_the_first_step_does_not_count_for_the_time_left() -> None:
    now, stream = [0.0], io.StringIO()
    with ProgressReport("job", every=10, stream=stream, clock=lambda: now[0]) as report:
        for second, share in ((300.0, 0.0), (310.0, 0.5)):  # the first evaluation took 300 s
            now[0] = second
            report.update(share)
    assert "5:10 passed, 0:10 left" in stream.getvalue().splitlines()[-1]


def test_items_are_counted_as_they_are_taken() -> None:
    stream = io.StringIO()
    with ProgressReport("job", every=0, stream=stream) as report:
        taken = [(item, len(stream.getvalue().splitlines())) for item in report.count("ab", 2)]
    assert taken == [("a", 1), ("b", 2)]  # said before the work
    first, second, end = stream.getvalue().splitlines()
    assert first.endswith("1/2") and second.endswith("2/2") and "50.0 %" in second and "100.0 %" in end


def test_a_changed_work_tree_is_told(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "a").write_text("1")
    for words in (("init",), ("add", "a"), ("commit", "-m", "x")):
        git(*words)
    clean = git_sha(tmp_path)
    (tmp_path / "a").write_text("2")
    assert clean is not None and "+" not in clean and git_sha(tmp_path) == f"{clean}+changes"


def test_a_refused_launch_leaves_the_recipe_that_it_was_given(tmp_path: Path) -> None:
    """`--recipe RUN/config.yaml`, with its comments."""
    given = b"# mine\nseed: 1\n"
    (tmp_path / "config.yaml").write_bytes(given)
    run = RunFolder(tmp_path, Settings(), seed=0)
    assert (tmp_path / "config.yaml").read_bytes() != given
    run.discard()
    assert (tmp_path / "config.yaml").read_bytes() == given and len([p for p in tmp_path.iterdir() if p.name != ".lock"]) == 1
