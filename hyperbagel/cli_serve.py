"""`hyperbagel serve`: the OpenAI-compatible server."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from hyperbagel import cli_checks as checks
from hyperbagel.cli_options import Dtype, Graphs, Model, Planner, given, note
from hyperbagel.core.errors import InputError

KEY_VARIABLE = "HYPERBAGEL_API_KEY"


def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 stands for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.")] = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name that requests may use, where a proxy stands before a keyless server; repeatable."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must send.", envvar=KEY_VARIABLE, show_default="none is needed")
    ] = None,
    queue: Annotated[int | None, typer.Option(help="How many pictures and answers may wait.", show_default="64")] = None,
    batch: Annotated[
        int | None, typer.Option(help="How many pictures or answers may be at work together on a device.", show_default="8")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model.", show_default="its folder's name")] = None,
    device: Annotated[list[str] | None, typer.Option(help="cpu, cuda, cuda:1 ...; repeat it for several devices.")] = None,
    dtype: Dtype = None,
    graphs: Graphs = False,
    planner: Planner = None,
    replicas: Annotated[
        int | None, typer.Option(help="Servers behind this one address, on Ray Serve (extra 'scale').", show_default="one, without Ray")
    ] = None,
) -> None:
    """Serve the model over HTTP, to OpenAI's clients and on a web page."""
    checks.check_at_least("--queue", queue, 1)
    checks.check_at_least("--batch", batch, 1)
    checks.check_at_least("--replicas", replicas, 1)
    if replicas is not None and len(device or ()) > 1:
        raise InputError("got --replicas and several --device, expected only one of the two; each replica uses one device")
    if not 0 <= port < 2**16:
        raise InputError(f"got --port {port}, expected 0 to 65535, choose another")
    # `-e HYPERBAGEL_API_KEY=$KEY` with KEY unset must not start a server that is open to everybody.
    if api_key is None and os.environ.get(KEY_VARIABLE) == "":
        raise InputError(f"got an empty {KEY_VARIABLE}, expected a key; unset it to serve without one")
    private = host in ("127.0.0.1", "localhost", "::1")
    if api_key is None and not private:
        note("warning: no --api-key: anyone who reaches this address can use the model")
    from hyperbagel.pipeline import HyperBagel
    from hyperbagel.serve.app import create_app
    from hyperbagel.serve.run import bind, run, warm_up
    from hyperbagel.serve.schemas import Limits

    # DNS rebinding: any site can make its name point at this machine. A keyless server for this machine alone accepts no such name.
    hosts = allow_host or ([] if private and api_key is None else None)
    loaded = given(model=model, dtype=dtype, graphs=graphs or None, planner=planner)
    limits = Limits(**given(waiting=queue, batch=batch))
    if replicas is not None:
        from hyperbagel.serve.replicas import Settings, run_replicas

        settings = Settings(**loaded, device=device[0] if device else None, api_key=api_key, name=name, limits=limits, hosts=hosts)
        run_replicas(settings, replicas, host, port, lambda address: _tell(f"{replicas} x {settings.model}", address))
        return
    with bind(host, port) as listener:  # first, so that a taken port is told before a model is loaded
        models = [HyperBagel.from_pretrained(**loaded, device=one) for one in device or (None,)]
        for one in models:
            warm_up(one, limits.batch)
        app = create_app(models, api_key=api_key, name=name, limits=limits, hosts=hosts)
        run(app, listener, host, lambda address: _tell(models[0].name, address))


def _tell(what: str, address: str) -> None:
    print(f"serving {what} on {address}/v1\nweb page: {address}/", file=sys.stderr, flush=True)
