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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import openai
import pytest
from server_world import wait_for

from hyperbagel import cli
from hyperbagel.core.errors import InputError
from hyperbagel.pipeline import HyperBagel
from hyperbagel.serve import replicas
from hyperbagel.serve.app import DRAIN_SECONDS
from hyperbagel.serve.replicas import Replica, Settings, run_replicas
from hyperbagel.serve.run import bind
from hyperbagel.serve.schemas import Limits

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


def test_a_replica_is_made_of_all_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray shows each its own GPU alone, as the first."""
    settings = Settings("toybox", "cuda:1", "bfloat16", True, "none", "key", "name", Limits(n=1), ["a.example"])
    model, warmed = object(), list[Any]()
    monkeypatch.setattr(HyperBagel, "from_pretrained", lambda *given, **more: warmed.append((given, more)) or model)
    monkeypatch.setattr(replicas, "warm_up", lambda *given: warmed.append(given))
    monkeypatch.setattr(replicas, "create_app", lambda *given, **more: (given, more))
    app: Any = Replica(settings).__serve_build_asgi_app__()
    assert warmed == [(("toybox",), {"device": "cuda", "dtype": "bfloat16", "graphs": True, "planner": "none"}), (model, 8)]
    assert app == ((model,), {"api_key": "key", "name": "name", "limits": Limits(n=1), "hosts": ["a.example"]})


@pytest.mark.parametrize(("device", "gpus"), [(None, 1), ("cpu", 0), ("cuda:1", 1)])
def test_a_replica_has_a_gpu_where_there_is_one_unless_it_was_told_otherwise(
    device: str | None, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert replicas._needs(device) == {"num_cpus": 1, "num_gpus": gpus}


class Ray(types.ModuleType):
    """What of Ray is used, on a machine of two cores. Keeps how the replicas were started."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.serve, self.asked, self.ended = self, dict[str, Any](), list[str]()
        self.init = self.run = lambda *given, **more: None
        self.ingress = lambda: lambda kind: kind
        self.cluster_resources = lambda: {"CPU": 2.0}

    def start(self, http_options: dict[str, Any], **more: Any) -> None:
        bind(http_options["host"], http_options["port"]).close()  # nothing of ours stands in its place
        self.asked |= http_options

    def deployment(self, kind: type, **options: Any) -> Any:
        self.asked |= options
        return types.SimpleNamespace(bind=lambda settings: None)

    def shutdown(self) -> None:
        self.ended.append("shutdown")


@pytest.mark.parametrize("count", [2, 3])
def test_as_many_replicas_as_there_are_cores(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, told = Ray(), list[str]()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(replicas, "_wait", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="--replicas 3 with 2 CPUs") if count == 3 else nullcontext():
        run_replicas(Settings(device="cpu"), count, "127.0.0.1", 0, told.append)
    if count == 2:
        assert ray.asked["num_replicas"] == 2 and ray.asked["graceful_shutdown_timeout_s"] == DRAIN_SECONDS
        assert told == [f"http://127.0.0.1:{ray.asked['port']}"]
    assert ray.ended == ["shutdown"] * (4 - count), "serve's, and in any case Ray's"
