"""What the server adds to the library: python -m benchmarks.server [--model toybox] [--runs 40] [--out FILE.json]

The server runs as users run it, in a process of its own on a loopback socket, with one thread for the model, as here. Two arms take turns:
a request over HTTP from a client that keeps its connection, then the same call of the library in this process. Seeds differ from run to
run. Besides the time waited, processor time is given for the server's process and this one: on a busy machine it is the steadier figure.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from shutil import copyfileobj
from threading import Thread
from typing import Any

import httpx2
import torch
from PIL import Image

from benchmarks.finish import finish, head
from benchmarks.measure import Timing
from hyperbagel.pipeline import HyperBagel

PROMPT, QUESTION = "a red circle to the left of a blue square", "What colour is the circle?"


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server", description=__doc__)
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--runs", type=int, default=40, help="of each arm")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps of a picture, without guidance")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--note", default="", help="kept with the figures, say what else the machine was doing")
    options = parser.parse_args(given)
    for name in ("runs", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"got --{name} {getattr(options, name)}, expected at least 1")
    options.given = sys.argv[1:] if given is None else given
    return options


@contextmanager
def serving(model: str, checkout: Path | None = None) -> Iterator[tuple[str, int]]:
    """A running server: the address of its API and the id of its process. checkout: of the version that serves; None: this one."""
    folder = str(Path(model).resolve()) if Path(model).is_dir() else model
    command = [sys.executable, "-m", "hyperbagel.cli", "serve", "--model", folder, "--port", "0", "--device", "cpu"]
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # as in the library's arm; PyTorch would take every core
    home = (checkout or Path(__file__).parents[1]).resolve()  # `python -m` looks where it is started first
    threads |= {"PYTHONPATH": str(home)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | threads, cwd=home)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://\S+/v1", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line}{process.stderr.read()}")
        Thread(target=copyfileobj, args=(process.stderr, sys.stderr), daemon=True).start()  # a full pipe would stop the server
        yield found[0], process.pid
    finally:
        process.terminate()
        process.wait()


def about_picture(png: bytes, question: str, **settings: Any) -> dict[str, Any]:
    """The body of a chat request that asks about one picture."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(png)}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": parts}], **settings}


def other_picture(picture: Image.Image, i: int) -> Image.Image:
    """The picture with another i-th pixel, so that nothing of what was read of it before is found."""
    changed, at = picture.copy(), (i % picture.width, i // picture.width % picture.height)
    pixel = changed.getpixel(at)
    assert isinstance(pixel, tuple)
    changed.putpixel(at, (pixel[0] ^ 1, *pixel[1:]))
    return changed


def as_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def turns(runs: int, first: Callable[[int], Any], second: Callable[[int], Any], warmup: int = 3) -> tuple[list[float], list[float]]:
    """Seconds of both calls, made in turns, so that other load on the machine affects both alike."""
    spent: tuple[list[float], list[float]] = ([], [])
    for i in range(-warmup, runs):
        for times, call in zip(spent, (first, second), strict=True):
            begin = time.perf_counter()
            call(i + warmup)
            if i >= 0:
                times.append(time.perf_counter() - begin)
    return spent


def compare(runs: int, pid: int, server: Callable[[int], Any], library: Callable[[int], Any]) -> dict[str, Any]:
    """Milliseconds: of each arm, of the difference between successive calls, and of processor time (means of each arm, and overhead)."""
    worked: list[list[float]] = [[], []]

    def counted(arm: int, call: Callable[[int], Any], seconds: Callable[[], float]) -> Callable[[int], None]:
        def run(i: int) -> None:
            begin = seconds()
            call(i)
            worked[arm].append(seconds() - begin)

        return run

    a, b = turns(runs, counted(0, server, lambda: processor_seconds(pid)), counted(1, library, time.process_time))
    apart = Timing.of([x - y for x, y in zip(a, b, strict=True)])
    arms = {"server": in_ms(Timing.of(a)), "library": in_ms(Timing.of(b)), "overhead": in_ms(apart)}
    means = [sum(times[-runs:]) / runs * 1e3 for times in worked]
    return arms | {"processor": {"server": means[0], "library": means[1], "overhead": means[0] - means[1]}}


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far. The kernel counts in ticks of 10 ms, so it is right only on average."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_ms(timing: Timing) -> dict[str, float]:
    return {name: value if name == "runs" else value * 1e3 for name, value in asdict(timing).items()}


def first_text(client: httpx2.Client, body: dict[str, Any]) -> float:
    """Seconds from sending a question to the first text of its answer."""
    begin = time.perf_counter()
    with client.stream("POST", "/chat/completions", json=body | {"stream": True}) as events:
        for line in events.iter_lines():
            if line.startswith("data: {") and (json.loads(line[6:])["choices"] or [{}])[0].get("delta", {}).get("content"):
                return time.perf_counter() - begin
    raise SystemExit("an answer came without text")


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = head("server", options) | {"milliseconds": {}}
    model = HyperBagel.from_pretrained(options.model, device="cpu")
    source = model.generate(PROMPT, seed=0, steps=2)[0].image
    settings: dict[str, Any] = {"steps": options.steps, "text_scale": 1.0}
    with serving(options.model) as (address, pid), httpx2.Client(base_url=address, timeout=120) as client:

        def draw(seed: int) -> None:
            client.post("/images/generations", json={"prompt": PROMPT, "seed": seed, **settings}).raise_for_status()

        def edit(seed: int) -> None:
            form = {"prompt": "make the circle green", "seed": str(seed), "steps": str(options.steps), "text_scale": "1"}
            client.post("/images/edits", data=form, files={"image": as_png(source)}).raise_for_status()

        def ask(seed: int) -> None:
            client.post("/chat/completions", json=question(seed)).raise_for_status()

        def question(i: int) -> dict[str, Any]:
            return about_picture(as_png(other_picture(source, i)), QUESTION, max_tokens=16)

        out = found["milliseconds"]
        out["picture"] = compare(options.runs, pid, draw, lambda seed: model.generate(PROMPT, seed=seed, **settings))
        out["edit"] = compare(options.runs, pid, edit, lambda seed: model.edit(source, "make the circle green", seed=seed, **settings))
        out["answer"] = compare(options.runs, pid, ask, lambda seed: model.ask(QUESTION, other_picture(source, seed), max_tokens=16))
        firsts = [first_text(client, question(1000 + i)) for i in range(options.runs + 3)][3:]
        out["first streamed text"] = in_ms(Timing.of(firsts))
    return found


def table(found: dict[str, Any]) -> str:
    lines = [f"{'ms, median (10 to 90 %)':<24}{'server':>24}{'library':>24}{'overhead':>24}{'of the processor':>20}"]
    for name, arms in found["milliseconds"].items():
        cells = [arms] if "median" in arms else [arms[arm] for arm in ("server", "library", "overhead")]
        told = [f"{cell['median']:.1f} ({cell['low']:.1f} to {cell['high']:.1f})" for cell in cells]
        worked = f"{arms['processor']['overhead']:>20.1f}" if "processor" in arms else ""
        lines.append(f"{name:<24}" + "".join(f"{cell:>24}" for cell in told) + worked)
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    return finish(arguments(given), run, table, lambda found: False)


if __name__ == "__main__":
    sys.exit(main())
