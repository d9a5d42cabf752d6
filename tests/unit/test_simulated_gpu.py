"""The simulated GPU keeps the rules of a real one that a CPU lacks."""

from __future__ import annotations

import copy

import pytest
import torch
from simulated_gpu import OnGPU, SimulatedGPU, simulated_gpu
from torch import Tensor, nn

from hyperbagel.generate.graphs import Captured

if torch.cuda.is_available():
    pytest.skip("there is a real GPU", allow_module_level=True)


def test_tensors_of_two_devices_do_not_meet() -> None:
    host = torch.ones(3)
    with simulated_gpu():
        there = host.to("cuda")
        assert there.is_cuda and there.device == torch.device("cuda:0") and (there + torch.tensor(1.0)).tolist() == [2, 2, 2]
        for meet in (
            lambda: there + host,
            lambda: torch.cat([there, host]),
            lambda: host[there.long()],
            lambda: there.gather(0, host.long()),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                meet()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(3, device="cuda") + 1


def test_waits_and_copies_are_counted() -> None:
    with simulated_gpu() as gpu:
        x = torch.tensor([1.0, 2.0], device="cuda")
        x[[0, 1]] += torch.zeros(2).to("cuda")
        assert not gpu.waits and sum(gpu.uploads.values()) == 4  # numbers, zeros, and indices to read and to write
        assert x.sum().item() == 3 and x.tolist() == x.cpu().tolist() == [1, 2] and bool((x > 0).all()) and len(x[x > 1]) == 1
        assert sum(gpu.waits.values()) == 5
        launched = gpu.launches
        torch.cuda.synchronize()
        assert gpu.waits["synchronize"] == 1 and gpu.launches == launched


def test_modules_move_and_compute_there() -> None:
    layer = nn.Linear(3, 2).requires_grad_(False)
    want = layer(torch.ones(4, 3))
    with simulated_gpu(), torch.inference_mode():
        moved = copy.deepcopy(copy.deepcopy(layer).to("cuda"))
        assert isinstance(moved.weight, OnGPU) and torch.equal(moved(torch.ones(4, 3, device="cuda")).cpu(), want)
        assert moved.weight.t().is_inference() is moved.weight.is_inference()
    assert not isinstance(layer.weight, OnGPU)


def recorded(gpu: SimulatedGPU, add: int) -> tuple[Captured, Tensor]:
    x = torch.zeros(2, device="cuda")

    def step() -> Tensor:
        x.add_(add)
        return x[1:] * 2

    return Captured(step, x.device), x


def test_recording_computes_nothing_and_replays_repeat_it() -> None:
    with simulated_gpu() as gpu:
        step, x = recorded(gpu, 1)
        outs = [step().clone() for _ in range(4)]
        assert [out.tolist() for out in outs] == [[2], [4], [6], [8]] and x.tolist() == [4, 4]
        assert len(gpu.graphs) == 1 and gpu.replays == 3
        x.zero_()  # what a graph reads is read anew, where it was
        assert step().tolist() == [2]


@pytest.mark.filterwarnings("ignore:a step could not be recorded")
@pytest.mark.parametrize("step", [lambda x: x * x.sum().item(), lambda x: x + torch.ones(2).to("cuda"), lambda x: x[x > 0]])
def test_a_recording_may_not_wait_nor_copy_from_the_host(step: object) -> None:
    with simulated_gpu() as gpu:
        x = torch.ones(2, device="cuda")
        captured = Captured(lambda: step(x), x.device)  # type: ignore[operator]
        first, second = captured().tolist(), captured().tolist()
        assert first == second and gpu.replays == 0 and captured.graph is None  # it runs without one
