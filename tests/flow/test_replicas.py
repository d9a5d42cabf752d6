"""Two replicas behind one address on Ray Serve: one that is killed takes only its own requests with it. Needs the extra `scale`."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from server_world import wait_for

from hyperbagel import cli
from hyperbagel.pipeline import HyperBagel

RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not RAY, reason="ray is not installed (pip install 'ray[serve]'): replicas are not tested here")


def replicas_of(top: int) -> set[int]:
    """Process numbers of the replicas, which Ray starts from a daemon: known by their title and by our port's parent."""
    found = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            title = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if b"ServeReplica:hyperbagel" in title and f"HYPERBAGEL_TEST={top}".encode() in environment:
            found.add(int(folder.name))
    return found


@pytest.fixture
def address(model: HyperBagel) -> Iterator[str]:
    command = [sys.executable, "-m", "hyperbagel.cli", "serve", "--model", model.name, "--device", "cpu", "--port", "0", "--replicas", "2"]
    environment = os.environ | {"HYPERBAGEL_TEST": str(os.getpid()), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        seen = ""
        while (found := re.search(r"on (http://127\.0\.0\.1:\d+/v1)", seen)) is None:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
        assert replicas_of(os.getpid()) == set(), "no replica is left"
    finally:
        process.kill()
        process.wait()


@needs_ray
def test_a_killed_replica_takes_only_its_own_requests_with_it(address: str, model: HyperBagel) -> None:
    mine = os.getpid()
    with openai.OpenAI(api_key="none", base_url=address, max_retries=0, timeout=120) as client, ThreadPoolExecutor(8) as pool:
        assert len(replicas_of(mine)) == 2

        def draw(i: int, steps: int) -> str:
            try:
                answer = client.images.generate(prompt=f"car {i}", extra_body={"seed": i, "steps": steps})
                return "answered" if answer.data and answer.data[0].seed == i else "mixed up"  # type: ignore[attr-defined]
            except openai.APIError as error:
                return f"lost: {type(error).__name__}"

        assert set(pool.map(lambda i: draw(i, 1), range(8))) == {"answered"}
        events = list(client.images.generate(prompt="x", stream=True, partial_images=1, extra_body={"seed": 1, "steps": 4}))
        assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "completed"]
        running = [pool.submit(draw, i, 600) for i in range(8)]
        time.sleep(1.0)
        victim = min(replicas_of(mine))
        os.kill(victim, signal.SIGKILL)
        later = [pool.submit(draw, 100 + i, 1) for i in range(20)]
        outcomes = [one.result() for one in running]
        lost = [outcome for outcome in outcomes if outcome != "answered"]
        assert 0 < len(lost) < len(outcomes) and "mixed up" not in outcomes
        assert {one.result() for one in later} == {"answered"}
        wait_for(lambda: len(replicas_of(mine) - {victim}) == 2, 60)
        assert set(pool.map(lambda i: draw(i, 1), range(8))) == {"answered"}


def test_without_ray_it_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["serve", "--replicas", "2"]) == 2
    assert "pip install 'hyperbagel[scale]'" in capsys.readouterr().err
    assert cli.main(["serve", "--replicas", "0"]) == 2
    assert cli.main(["serve", "--replicas", "2", "--device", "cpu", "--device", "cpu"]) == 2
    assert "one of the two" in capsys.readouterr().err


WRONG = [
    (["--dtype", "int4"], "expected one of float32"),
    (["--model", "nowhere"], "got no folder"),
    (["--device", "tpu"], "tpu"),
    (["--planner", "nowhere"], "planner.json"),
]


@pytest.mark.parametrize(("wrong", "told"), WRONG)
def test_what_no_replica_could_load_is_said_before_ray_starts(
    wrong: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray: Any = types.ModuleType("ray")
    ray.serve = None  # nothing of it is called
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert cli.main(["serve", "--replicas", "2", *wrong]) == 2
    said = capsys.readouterr().err.strip()
    assert told in said and len(said.splitlines()) == 1
