"""Every path of `attend` against the slow definition: values and gradients."""

import pytest
import torch
from torch import Tensor

from hyperbagel.nn.attention import attend, causal_mask, prepared, readers, reference, without_groups


def inputs(sq: int, sk: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(sq * 100 + sk)
    return tuple(torch.randn(2, h, s, 8, generator=g, dtype=torch.float64) for h, s in ((2 * groups, sq), (2, sk), (2, sk)))  # type: ignore[return-value]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (5, 5), (2, 7), (1, 9)])
@pytest.mark.parametrize("kind", ["full", "causal", "mask"])
def test_value_and_gradient(groups: int, sq: int, sk: int, kind: str) -> None:
    mask = None
    if kind == "mask":
        mask = torch.rand(2, 1, sq, sk, generator=torch.Generator().manual_seed(0)) < 0.5
        mask[..., 0] = True
    slow = [x.requires_grad_() for x in inputs(sq, sk, groups)]
    fast = [x.detach().clone().requires_grad_() for x in slow]
    want = reference(*slow, causal_mask(sq, sk, torch.device("cpu")) if kind == "causal" else mask)
    got = attend(*fast, mask, causal=kind == "causal")
    torch.testing.assert_close(got, want)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (want * weight).sum().backward()
    (got * weight).sum().backward()
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(("sq", "sk"), [(1, 9), (4, 9)])
def test_without_groups(sq: int, sk: int) -> None:
    q, k, v = inputs(sq, sk, 3)
    mask = torch.rand(2, 1, sq, sk, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 0] = True
    torch.testing.assert_close(without_groups(q, k, v, mask), reference(q, k, v, mask))


def test_causal_is_aligned_bottom_right() -> None:
    assert causal_mask(2, 5, torch.device("cpu")).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_mask_and_causal_together_are_refused() -> None:
    q, k, v = inputs(2, 2, 1)
    with pytest.raises(AssertionError):
        attend(q, k, v, torch.ones(2, 2, dtype=torch.bool), causal=True)


@pytest.mark.parametrize(("sq", "sk", "causal"), [(1, 9, True), (4, 9, True), (5, 5, True), (4, 9, False)])
def test_prepared_once_is_what_each_call_would_make(sq: int, sk: int, causal: bool) -> None:
    q, k, v = (x.float() for x in inputs(sq, sk, 3))
    given = None if causal else torch.rand(2, 1, sq, sk, generator=torch.Generator().manual_seed(0)) < 0.5
    if given is not None:
        given[..., 0] = True
    with torch.no_grad():
        mask, flag = prepared(given, causal, sq, sk, q, "sdpa")
        torch.testing.assert_close(attend(q, k, v, mask, flag), attend(q, k, v, given, causal))
        assert prepared(given, causal, sq, sk, q, "reference") == (given, causal)
        assert prepared(given, causal, sq, sk, q, "flash") == (given, causal)
    if given is not None:
        assert prepared(given, False, sq, sk, q.bfloat16(), "sdpa")[0] is given  # numbers to add serve fp32 on a CPU alone


def test_readers_in_several_threads_leave_the_switch_as_it_was() -> None:
    """cuDNN's switch is the whole process's: the last who reads texts turns it back, not the first."""
    was = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for begun in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(begun)
            one, other = readers(), readers()
            one.__enter__()
            other.__enter__()
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            one.__exit__(None, None, None)
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            other.__exit__(None, None, None)
            assert torch.backends.cuda.cudnn_sdp_enabled() is begun
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)
