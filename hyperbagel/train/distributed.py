"""Data-parallel training over processes started by torchrun: the same weights on every rank, each its own samples, gradients averaged.

A single process is rank 0 of 1 and pays nothing. Rank 0 decides what depends on a clock (when to stop, the learning rate by time) and tells
the others, so that all ranks take the same steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# Imported before any process group exists: its functions take the group at import as their default and would hold it until the process
# ends, with threads that may then need an interpreter that is gone (training on two processes aborted at its end one time in ten).
import torch.distributed.nn
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.core.hardware import agree_on_bf16, fast_bf16

# How long a rank waits for another. If weights are not split, rank 0 alone evaluates, draws sheets and writes, which at 7B may take longer
# than NCCL's ten minutes. If a rank dies, torchrun ends the others; this timeout is not needed for that.
PATIENCE = timedelta(hours=6)
MESSAGE = 2**26  # values averaged in one message, 256 MB in fp32: a 7B drafter's gradients all at once would take two more copies of them


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of it (train.sharding)."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its storage; a whole tensor is its own part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@dataclass(frozen=True)
class World:
    """This process's place among the processes that train together."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Rank 0 logs, evaluates and writes."""
        return self.rank == 0

    def agree(self, *values: float) -> list[float]:
        """Rank 0's values, on every rank."""
        if self.size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64, device=_wire())
        dist.broadcast(told, 0)
        return told.tolist()

    def tell(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        if self.size == 1:
            return text
        told = [text]
        dist.broadcast_object_list(told, 0)
        return told[0]

    def all(self, flag: bool) -> bool:
        """Whether `flag` is true on every rank."""
        if self.size == 1:
            return flag
        told = torch.tensor(float(flag), device=_wire())
        dist.all_reduce(told, dist.ReduceOp.MIN)
        return bool(told)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks of a number that each has its own of."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def wait(self) -> None:
        """Wait until every rank is here, such as for rank 0 to have evaluated or written."""
        if self.size > 1:
            dist.barrier()

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank rank 0's values."""
        if self.size > 1:
            for tensor in tensors:
                if not is_sharded(tensor):  # a split one began as the same tensor on every rank
                    dist.broadcast(tensor.data, 0)

    @torch.no_grad()
    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replace each gradient by its mean over ranks, in messages of bounded size. Gradients of split parameters are means already.

        A parameter that a rank's batch did not use counts as zero there; one that no rank used keeps no gradient, so the optimiser does not
        move it."""
        parameters = [p for p in parameters if not is_sharded(p)]
        if self.size == 1 or not parameters:
            return
        touched = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
        dist.all_reduce(touched)
        moved = [p for p, hits in zip(parameters, touched.tolist(), strict=True) if hits]
        for some in _messages(moved):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in some])
            dist.all_reduce(flat)
            for p, part in zip(some, flat.div_(self.size).split([p.numel() for p in some]), strict=True):
                if p.grad is None:
                    p.grad = part.view_as(p).clone()  # not a view: the message's memory is given back
                else:
                    p.grad.copy_(part.view_as(p))


def _messages(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters in order, as many per message as fit; a larger one is a message by itself."""
    held: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if held and size + parameter.numel() > MESSAGE:
            yield held
            held, size = [], 0
        held.append(parameter)
        size += parameter.numel()
    if held:
        yield held


def _wire() -> str:
    """The device that a message must be on."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def join_world(device: torch.device) -> World:
    """The world that torchrun's environment describes (RANK, WORLD_SIZE), or this process alone.

    Raises:
        InputError: the environment names a world but is not whole.
    """
    if "WORLD_SIZE" not in os.environ:
        return World()
    try:
        world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    except (KeyError, ValueError) as error:
        raise InputError(f"got WORLD_SIZE but no usable RANK ({error}), expected both, start several processes with torchrun") from error
    if world.size > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        if device.type == "cpu":
            agree_on_bf16(bool(world.agree(fast_bf16(device))[0]))
    return world


def leave_world() -> None:
    """Undo `join_world`."""
    if dist.is_initialized():
        dist.destroy_process_group()
