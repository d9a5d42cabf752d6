"""The mixed objective against its definition."""

import pytest
import torch

from hyperbagel.train.losses.flow import answer_loss, flow_by_time, flow_loss, mixed_objective


def test_answers_count_by_the_root_of_their_length() -> None:
    short, long = torch.tensor([3.0]), torch.full((4,), 1.0)
    weights = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.5])
    # (1 * 3 + 4 * 0.5 * 1) / (1 + 2)
    assert answer_loss(torch.cat([short, long]), weights).item() == pytest.approx(5 / 3)
    assert answer_loss(torch.cat([short, long]), 7 * weights).item() == pytest.approx(5 / 3)


def test_mixed_objective_weighs_and_leaves_out() -> None:
    squared = torch.full((2, 3), 0.5, requires_grad=True)
    ce, weights, none = torch.tensor([2.0, 4.0], requires_grad=True), torch.ones(2), torch.zeros(0)
    loss, parts = mixed_objective(squared, ce, weights, mse_weight=2.0, ce_weight=0.25)
    assert loss.item() == pytest.approx(2 * 0.5 + 0.25 * 3) and parts["mse"].item() == 0.5 and parts["ce"].item() == 3.0
    loss.backward()
    assert torch.allclose(squared.grad, torch.full((2, 3), 2 / 6)) and torch.allclose(ce.grad, torch.full((2,), 0.125))  # type: ignore[arg-type]
    assert set(mixed_objective(squared, none, none)[1]) == {"mse"}
    assert set(mixed_objective(none.reshape(0, 3), ce, weights)[1]) == {"ce"}
    with pytest.raises(ValueError, match="without noise and answer tokens"):
        mixed_objective(none.reshape(0, 3), none, none)


def test_by_time_is_a_partition() -> None:
    t = torch.tensor([0.0, 0.1, 0.3, 0.6, 0.99, 1.0])
    squared = torch.arange(6.0)[:, None].expand(6, 2)
    bins = flow_by_time(squared, t)
    assert bins.tolist() == [0.5, 2.0, 3.0, 4.5]
    assert flow_by_time(squared[:2], t[:2]).isnan().tolist() == [False, True, True, True]
    assert flow_loss(squared).item() == 2.5
