"""A server under mixed use for a long time: python -m benchmarks.soak [--model toybox] [--minutes 20] [--clients 4] [--out FILE.json]

Clients draw, edit, ask, stream, leave in the middle, send what is refused and type on the live socket, at random but from few seeds. So
each request comes again and again, and must give the same answer, or the same picture, in whatever batch it lands. Memory, threads and open
files of the server's process are noted every few seconds. It fails if a status or a result is not what it must be, if work is left once the
clients are gone, or if the idle server then holds more files than after one request of each kind, or more than two threads a client beyond
those it had then: a client has one request at work, and may have left another. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image
from websockets.sync.client import connect

from benchmarks.finish import finish, head
from benchmarks.server import about_picture, as_png, data_url, serving
from hyperbagel.toybox.render import render
from hyperbagel.toybox.scene import Scene, Thing

EVERY = 5.0  # seconds between two looks at the process
SEEDS = 3
NEAR = 2  # levels of 255 by which a pixel may differ from batch to batch
DRAWN = ("a red circle to the left of a blue square", "three green stars", "a small yellow car")
EDITED = ("make the circle green", "remove the car", "make the background navy")
ASKED = ("What colour is the circle?", "How many things are there?", "Tell me all about this picture.")


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--note", default="", help="kept with the figures, say what else the machine was doing")
    options = parser.parse_args(given)
    if not options.minutes > 0 or options.clients < 1:
        parser.error(f"got --minutes {options.minutes:g} and --clients {options.clients}, expected some of both")
    options.given = sys.argv[1:] if given is None else given
    return options


@dataclass
class Seen:
    """What all clients have seen. first: of each request, its first result."""

    first: dict[str, Any] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    apart: int = 0  # the largest difference between two pictures of one request
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, kind: str) -> None:
        """Counts what has no result to compare."""
        with self.lock:
            self.done[kind] += 1

    def add(self, kind: str, key: str, result: str | bytes) -> None:
        """Counts a result, a text or a picture's file, and compares it with the first one of this request."""
        value: Any = result if isinstance(result, str) else np.asarray(Image.open(io.BytesIO(result)).convert("RGB")).astype(int)
        with self.lock:
            self.done[kind] += 1
            first = self.first.setdefault(f"{kind} {key}", value)
            if isinstance(value, str) and isinstance(first, str):
                if value != first:
                    self.wrong.append(f"{kind} {key}: got {value!r}, expected {first!r} as before")
            elif type(value) is not type(first) or value.shape != first.shape or (apart := int(np.abs(first - value).max())) > NEAR:
                self.wrong.append(f"{kind} {key}: got another picture than before")
            else:
                self.apart = max(self.apart, apart)


class Client:
    """One user with a connection of their own."""

    def __init__(self, address: str, students: list[str], seen: Seen, seed: int) -> None:
        self.http, self.seen, self.rng = httpx2.Client(base_url=address, timeout=300), seen, random.Random(seed)
        self.students, self.live_address = students, address.replace("http", "ws", 1) + "/live"
        things = (Thing("circle", "red", "large", 4), Thing("car", "blue", "large", 8))
        self.picture = as_png(Image.fromarray(render(Scene("cream", things), 64)))
        self.url = data_url(self.picture)
        self.kinds: list[Callable[[], None]] = [self.draw, self.edit, self.ask, self.leave, self.refused, self.live]

    def asked(self, texts: tuple[str, ...]) -> tuple[dict[str, Any], str]:
        """Settings of a picture, and what tells the request from others."""
        body: dict[str, Any] = {
            "prompt": self.rng.choice(texts),
            "seed": self.rng.randrange(SEEDS),
            "student": self.rng.choice(self.students),
        }
        if body["student"] == "none":
            body |= {"steps": 4, "text_scale": 2.0}
        return body, json.dumps(body, sort_keys=True)

    def draw(self) -> None:
        body, key = self.asked(DRAWN)
        how = self.rng.choice(({}, {"stream": True, "partial_images": 2}, {"think": True, "max_think_tokens": 64}, {"n": 2}))
        if how.get("stream"):
            events = self.events("/images/generations", body | how)
            results = [base64.b64decode(event["b64_json"]) for event in events if event["type"].endswith("completed")]
        else:
            data = self.http.post("/images/generations", json=body | how).raise_for_status().json()["data"]
            results = [base64.b64decode(item["b64_json"]) for item in data]
        for i, result in enumerate(results):
            apart = "planned" if how.get("think") else "draw"
            self.seen.add(apart, key if i == 0 else f"{key} + {i}", result)
        if not results:
            raise ValueError("a stream without its picture")

    def edit(self) -> None:
        body, key = self.asked(EDITED)
        form = {name: str(value) for name, value in body.items()}
        told = self.http.post("/images/edits", data=form, files={"image": self.picture}).raise_for_status().json()
        self.seen.add("edit", key, base64.b64decode(told["data"][0]["b64_json"]))

    def question(self) -> tuple[dict[str, Any], str]:
        text, warmth = self.rng.choice(ASKED), self.rng.choice((0, 0, 1))
        body = about_picture(self.picture, text, max_tokens=80, temperature=warmth, seed=self.rng.randrange(SEEDS))
        return body, f"{text} {warmth} {body['seed'] if warmth else ''}"

    def ask(self) -> None:
        body, key = self.question()
        if self.rng.random() < 0.5:
            told = [
                event["choices"][0]["delta"].get("content") or "" for event in self.events("/chat/completions", body | {"stream": True})
            ]
            self.seen.add("ask", key, "".join(told))
        else:
            told = self.http.post("/chat/completions", json=body).raise_for_status().json()
            self.seen.add("ask", key, told["choices"][0]["message"]["content"])

    def events(self, path: str, body: dict[str, Any], most: int | None = None) -> list[dict[str, Any]]:
        """The events of a stream; with `most`, only that many, and then the client is gone."""
        found: list[dict[str, Any]] = []
        with self.http.stream("POST", path, json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    found.append(json.loads(line[6:]))
                if len(found) == most:
                    break
        return [event for event in found if event.get("choices") != []]

    def leave(self) -> None:
        if self.rng.random() < 0.5:
            self.events("/chat/completions", self.question()[0] | {"stream": True}, most=1)
        else:
            body = {"prompt": self.rng.choice(DRAWN), "student": "none", "stream": True, "partial_images": 3, "steps": 50}
            self.events("/images/generations", body, most=1)
        self.seen.count("left")

    def refused(self) -> None:
        path, body = self.rng.choice((("/images/generations", {"prompt": ""}), ("/chat/completions", {"messages": []}), ("/nowhere", {})))
        status = self.http.post(path, json=body).status_code
        if status not in (400, 404):
            raise ValueError(f"{path} with {body}: got status {status}, expected a refusal")
        self.seen.count("refused")

    def live(self) -> None:
        """Types a text and waits for its last picture; with a picture to edit, the socket is then dropped in the middle of the next."""
        source, text, seed = self.rng.random() < 0.5, self.rng.choice(DRAWN), self.rng.randrange(SEEDS)
        with connect(self.live_address, max_size=None) as line:
            line.send(json.dumps({"type": "hello"}))
            if source:
                line.send(json.dumps({"type": "source", "id": 0, "image": self.url}))
            for end in range(len(text) - 4, len(text) + 1):
                line.send(json.dumps({"type": "draw", "id": end, "prompt": text[:end], "seed": seed}))
            while True:
                told = line.recv(timeout=300)
                if isinstance(told, str):
                    if json.loads(told)["type"] == "error":
                        raise ValueError(f"live: {told}")
                    continue
                size = int.from_bytes(told[:4], "big")
                if json.loads(told[4 : 4 + size])["id"] == len(text):
                    break
            self.seen.add("live", f"{text} {seed} {source}", told[4 + size :])
            if source:
                line.send(json.dumps({"type": "draw", "id": 999, "prompt": text, "seed": seed, "tier": "full"}))

    def work(self, until: float) -> None:
        while time.monotonic() < until:
            self.once(self.rng.choice(self.kinds))

    def once(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is, the server should not have caused it
            with self.seen.lock:
                self.seen.wrong.append(f"{act.__name__}: {type(error).__name__}: {error}")


def look(pid: int) -> dict[str, float]:
    """A process's resident memory in MB, and its numbers of threads and open files."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {"mb": int(status["VmRSS"].split()[0]) / 1024, "threads": int(status["Threads"]), "files": len(os.listdir(f"/proc/{pid}/fd"))}


def settled(http: httpx2.Client, pid: int) -> dict[str, float]:
    """A look at the process once it is idle. Adds what still runs or waits, if it never is."""
    end = time.monotonic() + 60
    while True:
        lines = http.get("/metrics").text.splitlines()
        left = sum(float(line.split()[1]) for line in lines if line.startswith(("hyperbagel_running ", "hyperbagel_waiting ")))
        if not left or time.monotonic() > end:
            time.sleep(2)  # closed connections take a moment
            return look(pid) | {"left": left}
        time.sleep(0.1)


def run(options: argparse.Namespace) -> dict[str, Any]:
    seen, looks = Seen(), list[dict[str, float]]()
    found = head("soak", options) | {"clients": options.clients}
    with serving(options.model) as (address, pid), httpx2.Client(base_url=address.removesuffix("/v1"), timeout=60) as http:
        [card] = http.get("/v1/models").json()["data"]
        students = ["none", *card.get("students", [])]
        first = Client(address, students, seen, seed=-1)
        for act in first.kinds * 4:  # every kind, and most of its forms
            first.once(act)
        first.http.close()
        before, begin = settled(http, pid), time.monotonic()
        clients = [Client(address, students, seen, seed=i) for i in range(options.clients)]
        threads = [threading.Thread(target=client.work, args=(begin + options.minutes * 60,)) for client in clients]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(min(EVERY, options.minutes * 6))
            looks.append({"seconds": time.monotonic() - begin, **look(pid)})
        for client in clients:
            client.http.close()
        found |= {"idle_before": before, "idle_after": settled(http, pid), "tenths": tenths(looks)}
    return found | {"done": dict(seen.done), "wrong": seen.wrong[:50], "n_wrong": len(seen.wrong), "apart": seen.apart}


def tenths(looks: list[dict[str, float]]) -> list[dict[str, float]]:
    """The looks of each tenth of the time, if it has any: its end in minutes, and means; of threads the most."""
    parts = [looks[len(looks) * i // 10 : len(looks) * (i + 1) // 10] for i in range(10)]
    return [
        {"minutes": part[-1]["seconds"] / 60, "threads": max(one["threads"] for one in part)}
        | {name: statistics.mean(one[name] for one in part) for name in ("mb", "files")}
        for part in parts
        if part
    ]


def table(found: dict[str, Any]) -> str:
    lines = [f"{'minutes':>12}{'MB':>8}{'threads':>10}{'files':>8}"]
    for at in found["tenths"]:
        lines.append(f"{at['minutes']:>12.1f}{at['mb']:>8.0f}{at['threads']:>10}{at['files']:>8.1f}")
    for name in ("idle_before", "idle_after"):
        at = found[name]
        lines.append(f"{name.replace('_', ' '):>12}{at['mb']:>8.0f}{at['threads']:>10}{at['files']:>8}   {at['left']:g} left in the engine")
    lines.append(", ".join(f"{count} {kind}" for kind, count in sorted(found["done"].items())))
    lines.append(f"pictures of one request differ by at most {found['apart']} of 255; {found['n_wrong']} things were wrong")
    return "\n".join([*lines, *found["wrong"]])


def failed(found: dict[str, Any]) -> bool:
    before, after = found["idle_before"], found["idle_after"]
    threads = before["threads"] + 2 * found["clients"]  # the pool that reads and encodes grows with what comes at a time, and stays
    return bool(found["n_wrong"] or after["left"] or after["files"] > before["files"] or after["threads"] > threads)


def main(given: list[str] | None = None) -> int:
    return finish(arguments(given), run, table, failed)


if __name__ == "__main__":
    sys.exit(main())
