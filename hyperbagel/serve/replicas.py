"""Several servers behind one address, on Ray Serve: on the cores or GPUs of one machine, or of a Ray cluster.

Each replica is a process with its own model, queue and engine (`create_app`). Ray's proxy sends each request to the least busy replica, and
Ray restarts a replica that dies. Only what that replica was working on is lost.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import FastAPI

from hyperbagel.core.errors import InputError
from hyperbagel.core.hardware import usable_device
from hyperbagel.model.inspection import inspect_folder
from hyperbagel.model.planner import planner_folder
from hyperbagel.nn.quantized import numbers
from hyperbagel.pipeline import HyperBagel, model_folder
from hyperbagel.serve.app import DRAIN_SECONDS, create_app
from hyperbagel.serve.run import bind, url_of, warm_up
from hyperbagel.serve.schemas import Limits


@dataclass(frozen=True)
class Settings:
    """What every replica is made from. Each reads it in its own process, so the model's folder must exist on every machine."""

    model: str = "toybox"
    device: str | None = None
    dtype: str | None = None
    graphs: bool = False
    planner: str | None = None
    api_key: str | None = None
    name: str | None = None
    limits: Limits = field(default_factory=Limits)
    hosts: list[str] | None = None


class Replica:
    """The class that Ray instantiates once per replica. The method with underscores in its name is Ray's hook."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Ray shows each replica only its own GPU, as number 0, whatever its number on the machine.
        device = "cuda" if (settings.device or "").startswith("cuda") else settings.device
        how: dict[str, Any] = {"dtype": settings.dtype, "graphs": settings.graphs, "planner": settings.planner}
        self.model = HyperBagel.from_pretrained(settings.model, device=device, **how)
        warm_up(self.model, settings.limits.batch)

    def __serve_build_asgi_app__(self) -> FastAPI:
        s = self.settings
        return create_app(self.model, api_key=s.api_key, name=s.name, limits=s.limits, hosts=s.hosts)


def run_replicas(settings: Settings, replicas: int, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM. RAY_ADDRESS names a cluster to join; without it, one is started on this machine, and stopped after.

    Raises:
        InputError: Ray is not installed, the port is taken, there are fewer cores or GPUs than replicas or, without RAY_ADDRESS, a
            replica could not load the model.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics leave the machine unless the user asks for it
        import ray
        from ray import serve
    except ImportError as error:
        told = f"got --replicas {replicas} without Ray, expected it installed; pip install 'hyperbagel[scale]', or leave --replicas out"
        raise InputError(told) from error
    if not os.environ.get("RAY_ADDRESS"):  # replicas on this machine, where what stops them all can be told in one line
        check_here(settings)
    listener = bind(host, port)  # fails at once if the port is taken, and finds a free one for port 0
    port = listener.getsockname()[1]
    listener.close()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        needs = _needs(settings.device)
        have = ray.cluster_resources()
        for what, amount in (("CPU", needs["num_cpus"]), ("GPU", needs["num_gpus"])):
            if have.get(what, 0) < replicas * amount:
                raise InputError(f"got --replicas {replicas} with {have.get(what, 0):g} {what}s, expected one for each; ask for fewer")
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR", "enable_access_log": False})
        deployment = serve.deployment(
            serve.ingress()(Replica),
            name="hyperbagel",
            num_replicas=replicas,
            # A replica's own queue refuses with 429 when it is full; this higher limit only makes Ray spread requests evenly.
            max_ongoing_requests=settings.limits.waiting + 4 * settings.limits.batch,
            ray_actor_options=needs,
            graceful_shutdown_timeout_s=DRAIN_SECONDS,
        )
        serve.run(deployment.bind(settings), name="hyperbagel", route_prefix="/")
        ready(url_of(host, port))
        _wait()
        serve.shutdown()
    finally:
        ray.shutdown()


def check_here(settings: Settings) -> None:
    """Raises InputError for a device, dtype, model or planner that no replica on this machine could use. Reads no more than the weights'
    headers, and touches no GPU, which this process would hold for as long as the server runs."""
    if settings.device and not settings.device.startswith("cuda"):
        usable_device(settings.device)
    numbers(settings.dtype, torch.device("cpu"))
    inspect_folder(model_folder(settings.model))
    planner_folder(settings.planner, model_folder(settings.model))


def _needs(device: str | None) -> dict[str, Any]:
    """The resources of one replica, by Ray's names: one core, and one GPU if it runs on one."""
    gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return {"num_cpus": 1, "num_gpus": int(gpu)}


def _wait() -> None:
    """Waits for SIGINT or SIGTERM."""
    stop = threading.Event()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: stop.set())
    while not stop.wait(1.0):  # with a time limit, so that Python gets to run the handlers
        pass
