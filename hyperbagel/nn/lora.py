"""Adapters over one frozen model: low-rank (LoRA, Hu et al. 2021) or full changes of named leaf modules, as a module of their own.

`attach` gives a second model that shares every tensor with the first and differs only where the adapter says so. Which network runs
depends on which object is called: nothing is switched, and the first model computes bit for bit what it did before.

Shape legend: r rank, I / O input and output size of a linear layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperbagel.nn.quantized import QuantizedLinear, matrix_of

M = TypeVar("M", bound=nn.Module)


class LowRank(nn.Module):
    """The change B A of a weight [O, I]; names as in PEFT: lora_A.weight [r, I], lora_B.weight [O, r]. B starts at zero: no change."""

    def __init__(self, inner: int, outer: int, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.lora_A = nn.Linear(inner, rank, bias=False)
        self.lora_B = nn.Linear(rank, outer, bias=False)
        with torch.no_grad():
            self.lora_A.weight.copy_(torch.randn(rank, inner, generator=generator) * inner**-0.5)
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):  # autocast would only cast the fp32 copy back
            x = x.to(self.lora_A.weight.dtype)
        return self.lora_B(self.lora_A(x))


class AdaptedLinear(nn.Module):
    """base(x) + scale B A x, [..., I] -> [..., O]; the base layer is shared."""

    def __init__(self, base: nn.Linear, change: LowRank, scale: float) -> None:
        super().__init__()
        self.base, self.change, self.scale = base, change, scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.scale * self.change(x).to(y.dtype)


class MergedLinear(nn.Module):
    """The same as one matrix, with the base's bias. For inference, where two small products cost more than they save."""

    def __init__(self, base: nn.Linear, change: LowRank, scale: float) -> None:
        super().__init__()
        b, a = change.lora_B.weight, change.lora_A.weight
        before = matrix_of(base)
        self.register_buffer("weight", (before.to(b.dtype) + scale * b @ a).detach().to(before.dtype))
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


class _Node(nn.Module):
    """An empty container on the path to an adapted module, so that parameter names equal the model's."""


class Adapter(nn.Module):
    """Changes of leaf modules of a model, by name: `low_rank` ones and whole `copies` (which start equal to the model's).

    Parameter names are the model's own, e.g. `layers.0.q_proj.lora_A.weight` or `llm2vae.weight`; all require gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        low_rank: Iterable[str] = (),
        copies: Iterable[str] = (),
        *,
        rank: int = 16,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """alpha: the change is scaled by alpha / rank; None: alpha = rank. dtype: of the parameters; below fp32 for inference only."""
        super().__init__()
        self.low_rank, self.copies = tuple(low_rank), tuple(copies)
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        for name in self.low_rank:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear), f"{name}: only a linear layer has a low-rank change"
            self._put(name, LowRank(layer.in_features, layer.out_features, rank, generator).to(layer.weight.device, dtype))
        for name in self.copies:
            layer = model.get_submodule(name)
            own = layer.plain() if isinstance(layer, QuantizedLinear) else copy.deepcopy(layer)
            self._put(name, own.to(dtype).requires_grad_(True))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @torch.no_grad()
    def change(self, name: str) -> Tensor:
        """scale B A of one low-rank layer, [O, I], fp32."""
        b, a = (self.get_submodule(name).get_parameter(f"lora_{factor}.weight").float() for factor in "BA")
        return self.scale * (b @ a)

    def _put(self, name: str, module: nn.Module) -> None:
        *path, leaf = name.split(".")
        node: nn.Module = self
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, _Node())
            node = node.get_submodule(part)
        node.add_module(leaf, module)


def attach(model: M, adapter: Adapter, *, merged: bool = False) -> M:
    """A model of the same class that shares all tensors with `model` and runs the adapter's modules instead of its own.

    Training the adapter's parameters changes the result; training or moving `model` changes both. `merged` (inference only): each
    low-rank change, as it is now, is added to a copy of its layer's matrix.
    """
    changed: dict[str, nn.Module] = {name: adapter.get_submodule(name) for name in adapter.copies}
    for name in adapter.low_rank:
        base, change = model.get_submodule(name), adapter.get_submodule(name)
        assert isinstance(base, nn.Linear) and isinstance(change, LowRank)
        changed[name] = (MergedLinear if merged else AdaptedLinear)(base, change, adapter.scale)
    return _replace(model, changed)


def _replace(module: M, changed: dict[str, nn.Module]) -> M:
    """A shallow copy of the containers on the way to the changed modules; everything else is the same object."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    below: dict[str, dict[str, nn.Module]] = {}
    for name, new in changed.items():
        head, _, rest = name.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = new
        else:
            view._modules[head] = new
    for head, rest_changed in below.items():
        child = module._modules[head]
        assert child is not None
        view._modules[head] = _replace(child, rest_changed)
    return view


class Factors(NamedTuple):
    """A change [O, I] approximated by b [O, r] a [r, I]; the squared norms of what that misses and of the whole change."""

    a: Tensor
    b: Tensor
    missed: float
    whole: float


_EXACT = 1024  # a matrix whose smaller side is at most this is decomposed in full; of a larger one only the leading part


@torch.no_grad()
def factorise(change: Tensor, rank: int) -> Factors:
    """The best b a of that rank in least squares (Eckart-Young): the leading singular vectors, each factor with the root of the values.

    Large matrices take randomised subspace iteration (Halko et al. 2011), which comes very close; `missed` is the error of its result.
    """
    if min(change.shape) <= max(_EXACT, 2 * rank):
        u, s, vh = torch.linalg.svd(change.double(), full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same file every time
            u, s, v = torch.svd_lowrank(change, q=rank + 16, niter=8)
        vh = v.T
    r = min(rank, len(s))
    root = s[:r].sqrt()
    a, b = change.new_zeros(rank, change.shape[1]), change.new_zeros(change.shape[0], rank)
    a[:r], b[:, :r] = (root[:, None] * vh[:r]).to(change.dtype), (u[:, :r] * root).to(change.dtype)
    return Factors(a, b, float((change - b @ a).double().square().sum()), float(change.double().square().sum()))
