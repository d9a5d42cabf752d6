"""Queries, keys and values as one product: the same numbers, and only while the layers are the ones it was made of."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperbagel.nn.layers import RMSNorm
from hyperbagel.nn.projections import Projections, store_by_columns

E, HQ, HK, D = 24, 4, 2, 6


class TwoExperts(Projections):
    def __init__(self, bias: bool = True, normed: bool = True) -> None:
        super().__init__(HQ, HK, D, ("", "_moe_gen"))
        for suffix in self.names:
            for kind, heads in (("q", HQ), ("k", HK), ("v", HK)):
                self.add_module(f"{kind}_proj{suffix}", nn.Linear(E, heads * D, bias=bias))
            for kind in "qk":
                norm = RMSNorm(D, 1e-6)
                nn.init.uniform_(norm.weight, 0.5, 2.0)
                self.add_module(f"{kind}_norm{suffix}", norm if normed else nn.Identity())


def by_hand(module: Projections, x: Tensor, suffix: str) -> tuple[Tensor, Tensor]:
    own = {name.removesuffix(suffix): getattr(module, name) for name in module.names[suffix]}
    q, k, v = (F.linear(x, own[name].weight, own[name].bias).reshape(*x.shape[:2], -1, D) for name in ("q_proj", "k_proj", "v_proj"))
    if isinstance(own["q_norm"], RMSNorm):
        q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * own[name].weight for y, name in ((q, "q_norm"), (k, "k_norm")))
    return torch.cat([q, k], dim=2), v


def check(module: Projections, x: Tensor, suffix: str = "") -> None:
    for got, want in zip(module.project(x, suffix), by_hand(module, x, suffix), strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_one_product_gives_what_three_give(bias: bool, normed: bool) -> None:
    torch.manual_seed(0)
    module, x = TwoExperts(bias, normed), torch.randn(2, 5, E)
    names, before = [id(p) for p in module.parameters()], {name: value.clone() for name, value in module.state_dict().items()}
    for suffix in module.names:
        check(module, x, suffix)
    store_by_columns(module)
    first = dict(module.joined)
    store_by_columns(module)
    assert module.joined == first and set(first) == {"", "_moe_gen"}  # a second time makes nothing anew
    assert [id(p) for p in module.parameters()] == names
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for suffix in module.names:
        check(module, x, suffix)
        kind = getattr(module, f"k_proj{suffix}").weight
        assert kind.untyped_storage().data_ptr() == first[suffix].weight.untyped_storage().data_ptr()  # nothing is stored twice


@torch.no_grad()
def test_a_changed_weight_is_seen_and_another_layer_is_run() -> None:
    torch.manual_seed(1)
    module, x = TwoExperts(), torch.randn(1, 3, E)
    store_by_columns(module)
    module.v_proj.weight.mul_(-3.0)  # type: ignore[operator, union-attr]
    check(module, x)
    view = copy.copy(module)  # as nn.lora.attach makes them
    view._modules = dict(module._modules)
    for name in ("k_proj_moe_gen", "q_norm"):
        other = copy.deepcopy(module._modules[name])
        assert other is not None
        for parameter in other.parameters():
            parameter.data = parameter.data * 2 + 1
        view._modules[name] = other
    for suffix in module.names:
        check(view, x, suffix)
        check(module, x, suffix)
    store_by_columns(view)  # joined anew for itself alone
    assert view.joined.keys() == module.joined.keys()
    assert all(view.joined[suffix] is not module.joined[suffix] for suffix in module.names)
    for suffix in module.names:
        check(view, x, suffix)
        check(module, x, suffix)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("joined", [True, False])
@torch.inference_mode()
def test_keys_and_values_alone(joined: bool, normed: bool) -> None:
    torch.manual_seed(3)
    module, x = TwoExperts(normed=normed), torch.randn(2, 5, E)
    if joined:
        store_by_columns(module)
    for suffix in module.names:
        qk, v = by_hand(module, x, suffix)
        keys, values = module.project(x, suffix, queries=False)
        torch.testing.assert_close(keys, qk[:, :, HQ:], atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(values, v, atol=2e-6, rtol=2e-6)


@torch.no_grad()
def test_what_moves_loads_or_copies_a_module_unjoins_it() -> None:
    torch.manual_seed(4)
    module, x = TwoExperts(), torch.randn(1, 3, E)
    store_by_columns(module)
    other = copy.deepcopy(module)
    assert other.joined == {} and module.joined
    for parameter in other.parameters():
        parameter.mul_(0.5).add_(0.3)
    check(other, x)
    check(module, x)
    module.load_state_dict(other.state_dict())
    check(module, x)
    for suffix in module.names:
        for got, want in zip(module.project(x, suffix), other.project(x, suffix), strict=True):
            torch.testing.assert_close(got, want)
    store_by_columns(module)
    check(module.bfloat16().float(), x)
    assert module.joined == {}


def test_training_runs_the_layers_themselves() -> None:
    torch.manual_seed(2)
    module, x = TwoExperts(), torch.randn(1, 3, E)
    store_by_columns(module)
    sum(part.square().sum() for part in module.project(x)).backward()  # type: ignore[union-attr]
    for name in module.names[""]:
        assert all(p.grad is not None for p in getattr(module, name).parameters())


def test_other_types_are_not_joined() -> None:
    module = TwoExperts().bfloat16()
    store_by_columns(module)
    assert module.joined == {}
