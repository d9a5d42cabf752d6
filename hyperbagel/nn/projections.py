"""The query, key and value projections of an attention; at inference as one matrix product."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperbagel.nn.layers import RMSNorm, quick, root_of_squares


class Joined:
    """The three projections as one product, and the norms after it: [B, S, E] -> [B, S, Hq + 2 Hk, D]. For inference.

    The layers' weights become views of one matrix, stored by columns, so that nothing is stored twice; biases and norms are copied and
    must not be changed in place afterwards. Moving, converting, loading or copying the module discards this one (`Projections`).
    """

    def __init__(self, layers: Sequence[Any], norms: Sequence[Any], heads: Sequence[int]) -> None:
        """layers: the query, key and value projections, modules with weight and bias, of `heads` heads each. norms: of queries and keys,
        RMSNorm or Identity."""
        self.modules = *layers, *norms
        self.heads = [heads[0] + heads[1], heads[2]]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        self.weight = torch.cat([weight.detach() for weight in weights]).t().contiguous().t()
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        for weight, part in zip(weights, self.weight.split([len(weight) for weight in weights]), strict=True):
            weight.data = part
        self.scale: Tensor | None = None  # [Hq + Hk, D], sqrt(D) times the norms' weights
        self.eps = 0.0
        if all(isinstance(norm, RMSNorm) for norm in norms):
            self.eps = norms[0].eps
            self.scale = torch.cat([norm.weight.detach().expand(n, -1) for norm, n in zip(norms, heads)])
            self.scale *= self.scale.shape[1] ** 0.5

    def of(self, modules: Iterable[nn.Module | None]) -> bool:
        """Whether these are the modules it was made from: an adapter may have replaced one since."""
        return all(mine is theirs for mine, theirs in zip(self.modules, modules, strict=True))

    def __call__(self, x: Tensor, queries: bool = True) -> tuple[Tensor, Tensor]:
        """x [B, S, E] -> normed queries and keys [B, S, Hq + Hk, D] and values [B, S, Hk, D]; without `queries` keys alone and values."""
        skip = 0 if queries else self.heads[0] - self.heads[1]  # the query heads
        weight, bias, scale, heads = self.weight, self.bias, self.scale, [self.heads[0] - skip, self.heads[1]]
        if skip:
            rows = skip * (len(weight) // sum(self.heads))
            weight, bias = weight[rows:], None if bias is None else bias[rows:]
            scale = None if scale is None else scale[skip:]
        qk, v = F.linear(x, weight, bias).view(*x.shape[:2], sum(heads), -1).split(heads, dim=2)
        if scale is not None:
            root = root_of_squares(qk, self.eps)
            qk.mul_(scale).div_(root)
        return qk, v


class Projections(nn.Module):
    """What attentions share: three linear layers give a token's queries, keys and values; queries and keys are normed per head.

    Layers are found by name: q_proj, k_proj, v_proj, q_norm and k_norm, each followed by an expert's suffix.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, suffixes: Sequence[str] = ("",)) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.names = {s: [f"{kind}{s}" for kind in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")] for s in suffixes}
        self.joined: dict[str, Joined] = {}

    def join(self) -> None:
        """Joins the three layers of each expert into one product, where they are in fp32 on a CPU."""
        for suffix, names in self.names.items():
            modules: list[Any] = [self.get_submodule(name) for name in names]
            weights = [getattr(layer, "weight", None) for layer in modules[:3]]  # an adapted layer has no matrix of its own
            stale = suffix not in self.joined or not self.joined[suffix].of(modules)
            if stale and all(weight is not None and _served(weight) for weight in weights):
                joined = Joined(modules[:3], modules[3:], (self.heads, self.kv_heads, self.kv_heads))
                self.joined = {**self.joined, suffix: joined}  # a new dict: shallow copies of this module keep theirs

    def project(self, x: Tensor, suffix: str = "", queries: bool = True) -> tuple[Tensor, Tensor]:
        """x [B, S, E] -> normed queries and keys [B, S, Hq + Hk, D] and values [B, S, Hk, D]. Without `queries`: keys [B, S, Hk, D]
        and values."""
        modules: list[Any] = [self._modules[name] for name in self.names[suffix]]
        joined = self.joined.get(suffix)
        if joined is not None and quick(x) and joined.of(modules):
            return joined(x, queries)
        k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in modules[1:3])
        k = modules[4](k)
        return (torch.cat([modules[3](modules[0](x).unflatten(-1, (-1, self.head_dim))), k], dim=2) if queries else k), v

    # A joined matrix holds the weights as they were: moving, casting, loading or copying them makes it stale.

    def _apply(self, *args: Any, **how: Any) -> Any:
        self.joined = {}
        return super()._apply(*args, **how)

    def _load_from_state_dict(self, *args: Any, **how: Any) -> None:
        self.joined = {}
        super()._load_from_state_dict(*args, **how)

    def __deepcopy__(self, memo: dict[int, Any]) -> Projections:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update({name: {} if name == "joined" else copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return made


def store_by_columns(module: nn.Module) -> None:
    """Stores the fp32 weights of all linear layers on a CPU by columns, in place: same shapes, same values, other strides. For inference.

    x W^T then reads W in memory order. A W stored by rows is repacked in every product, which costs most where x has few rows: 2.4 to
    1.4 ms for all products of the embedded model with 11 rows (a verified draft), 7.2 to 4.8 with 64 (a picture's latents), the same with
    one (AVX512, one thread). One layer at a time, so that a memory-mapped model is never in memory twice.
    """
    for layer in module.modules():
        if isinstance(layer, Projections):
            layer.join()
        elif isinstance(layer, nn.Linear) and _served(layer.weight) and layer.weight.stride(0) != 1:
            layer.weight.data = layer.weight.data.t().contiguous().t()


def _served(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32
