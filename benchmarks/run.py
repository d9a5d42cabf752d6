"""Measures one model on one device: python -m benchmarks.run --shape toybox|7b|FOLDER --device cpu|cuda --out FILE.json"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import subjects
from benchmarks.finish import finish
from benchmarks.measure import device_rates, machine, measure
from benchmarks.operation import Operation
from benchmarks.operations import Workload, operations
from benchmarks.table import show
from hyperbagel.core.errors import InputError
from hyperbagel.core.run import git_sha, versions


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--shape", default="toybox", help="toybox, 7b (random weights) or a model folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", help="float32, bfloat16, int8 or nf4; default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--random", action="store_true", help="give the 7B shape random weights on a CPU too (int8: 19 GB), and time it")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--each", type=float, default=3.0, help="seconds of measuring an operation")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything; what does not fit is listed as left out")
    parser.add_argument("--only", default="", help="operations whose name holds this")
    parser.add_argument("--compile", metavar="BACKEND", help="also the steps through this backend of torch.compile, say inductor")
    parser.add_argument("--smallest", action="store_true", help="one size of each kind, to see that all runs")
    parser.add_argument("--note", default="", help="kept with the figures, say what else the machine was doing")
    options = parser.parse_args(given)
    options.given = sys.argv[1:] if given is None else given
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured, ready for JSON. Raises InputError for a shape or device that does not exist here."""
    start = time.perf_counter()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("got --device cuda, expected a GPU that torch can use; take --device cpu")
    hardware = machine(device)  # first: its load average is the machine's before our own work
    subject = subjects.load(options.shape, device, options.dtype, options.random)
    model = subject.parts.model
    found: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.run", *options.given]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": git_sha(Path(__file__).parent),
        "versions": versions(),
        "hardware": hardware,
        "note": options.note,
        "shape": {
            "name": options.shape,
            "weights": subject.weights,
            "dtype": model.precision,
            "tensors": len(list(model.parameters())),
            "parameters": sum(p.numel() for p in subjects.shapes_only(model.config).model.parameters()),  # codes hold several each
            "vae_parameters": sum(p.numel() for p in subject.parts.vae.parameters()),
        },
    }
    measured = model.device.type != "meta"
    on_gpu = model.device.type == "cuda"
    if measured:
        sizes = {"side": 8192, "elements": 2**30} if on_gpu else {"side": 1024, "elements": 2**24}
        found["rates"] = device_rates(device, model.dtype, min(options.each, 2.0), **sizes)
    else:
        found["note"] = "; ".join(filter(None, [options.note, "no GPU: nothing was timed, the 7B shapes were run on the meta device"]))
    workload = Workload.of(subject.parts)
    if options.smallest:
        workload = workload.smallest()
    found |= {"workload": vars(workload), "figures": [], "left_out": [], "failed": []}
    for name, ready in operations(subject.parts, workload, graphs=on_gpu, compiler=options.compile):
        if options.only not in name:
            continue
        if time.perf_counter() - start > options.budget:
            found["left_out"].append(name)
            continue
        operation: Operation | None = None
        try:
            # inference_mode as in the package; the FLOP counter sees nothing in it
            with torch.inference_mode() if measured else torch.no_grad():
                operation = ready()
                figure = _timed(operation, model.device, options.each, found["rates"]) if measured else _counted(operation)
            found["figures"].append({"name": name, **figure})
        except (RuntimeError, NotImplementedError) as error:  # including out of memory: the rest is still worth having
            found["failed"].append({"name": name, "error": str(error).splitlines()[0][:300]})
        operation = None  # its contexts may be most of the memory
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    found["seconds"] = time.perf_counter() - start
    if options.only and not any(found[kind] for kind in ("figures", "left_out", "failed")):
        raise InputError(f"got --only {options.only}, expected a part of an operation's name; leave it out to see them all")
    return found


def _timed(operation: Operation, device: torch.device, seconds: float, rates: dict[str, Any]) -> dict[str, Any]:
    """The time of one call, and the fraction of the device's best rate that it reaches."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timing = measure(operation.call, device, seconds=seconds)
    flops, bytes_ = operation.cost
    figure: dict[str, Any] = {
        **operation.settings,
        "milliseconds": {k: v * 1e3 for k, v in vars(timing).items() if k != "runs"},
        "runs": timing.runs,
        "flops": flops,
        "bytes": bytes_,
        "bound": operation.bound,
        "fraction": flops / timing.median / rates["matmul_flops_per_second"]
        if operation.bound == "matmul"
        else bytes_ / timing.median / rates["copy_bytes_per_second"],
    }
    if operation.tokens:
        figure["tokens_per_second"] = operation.tokens / timing.median
    if device.type == "cuda":
        figure["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return figure


def _counted(operation: Operation) -> dict[str, Any]:
    """The operation on the meta device, which goes through every shape and counts every matrix product."""
    with FlopCounterMode(display=False) as counter:
        operation.call()
    flops, bytes_ = operation.cost
    return {**operation.settings, "flops": flops, "flops_counted": counter.get_total_flops(), "bytes": bytes_, "bound": operation.bound}


def main(given: list[str] | None = None) -> int:
    options = arguments(given)

    def checked(options: argparse.Namespace) -> dict[str, Any]:
        if options.threads < 1:
            raise InputError(f"got --threads {options.threads}, expected at least 1")
        for name in ("each", "budget"):
            if not 0 < getattr(options, name) < float("inf"):
                raise InputError(f"got --{name} {getattr(options, name)}, expected seconds, more than 0")
        torch.set_num_threads(options.threads)
        return run(options)

    return finish(options, checked, show, lambda found: bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
