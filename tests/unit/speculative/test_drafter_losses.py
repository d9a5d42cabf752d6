"""Losses of drafters: against definitions, zero at the target, and no gradient where there is nothing to learn."""

import pytest
import torch
from torch import Tensor

from hyperbagel.speculative.drafters.autoregressive import Lesson
from hyperbagel.speculative.simulate import simulate
from hyperbagel.train.losses.drafter import block_loss, soft_terms, total_variation, unrolled_loss
from hyperbagel.train.stages.drafter import Recipe as settings

B, R, V = 2, 5, 9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lesson() -> Lesson:
    """Row 0 has five entries, row 1 two."""
    nothing = torch.zeros(B, 8, 3)
    return Lesson(
        nothing[:, :, None], nothing, torch.zeros(B, 8, dtype=torch.long), torch.tensor([2, 4]), torch.tensor([5, 2]),
        torch.zeros(B, R, dtype=torch.long), normal(B, R, V, seed=5),
    )  # fmt: skip


def test_terms_are_their_definitions() -> None:
    q, p = normal(4, V).double(), normal(4, V, seed=1).double()
    kl, entropy = soft_terms(q, p)
    reference = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q))
    torch.testing.assert_close(kl.double(), reference, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), torch.distributions.Categorical(logits=p).entropy(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(total_variation(q, p), 1 - torch.minimum(q.float().softmax(-1), p.float().softmax(-1)).sum(-1))


def test_a_smaller_vocabulary_learns_the_target_restricted_to_it() -> None:
    q, p = normal(4, V), normal(4, V, seed=1)
    cut = torch.where(torch.arange(V) < 4, q, float("-inf")).requires_grad_()
    kl, entropy = soft_terms(cut, p)
    small = soft_terms(q[:, :4], p[:, :4])
    torch.testing.assert_close((kl, entropy), small)
    kl.sum().backward()
    assert cut.grad is not None and torch.isfinite(cut.grad).all() and (cut.grad[:, 4:] == 0).all()


def test_zero_at_the_target_and_weights_of_the_steps() -> None:
    given = lesson()
    own = [given.logits.roll(-j, dims=1).requires_grad_() for j in range(3)]
    loss, metrics = unrolled_loss(own, given, ce_weight=0.0, decay=0.8)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and all(x.grad is not None and x.grad.abs().max() < 1e-6 for x in own)
    assert [metrics[f"rate_{i}"].item() for i in (1, 2, 3)] == [1, 1, 1]
    outs = [normal(B, R, V, seed=j) for j in range(3)]
    parts = []
    for j, out in enumerate(outs):
        valid = given.valid(j)
        parts.append(soft_terms(out[valid], given.logits.roll(-j, dims=1)[valid])[0].mean())
    want = sum(0.8**j * x for j, x in enumerate(parts)) / sum(0.8**j for j in range(3))
    torch.testing.assert_close(unrolled_loss(outs, given, ce_weight=0.0, decay=0.8)[0], want)
    hard = []  # -log of what the drafter gives the target's favourite
    for j, out in enumerate(outs):
        valid = given.valid(j)
        favourite = given.logits.roll(-j, dims=1)[valid].argmax(-1, keepdim=True)
        hard.append(-out[valid].log_softmax(-1).gather(1, favourite).mean())
    more = sum(0.8**j * x for j, x in enumerate(hard)) / sum(0.8**j for j in range(3))
    torch.testing.assert_close(unrolled_loss(outs, given, ce_weight=0.1, decay=0.8)[0], want + 0.1 * more)
    assert settings.model_fields["ce_weight"].default == 0.1  # Hyper-Bagel's


def test_nothing_is_learnt_beyond_an_answer() -> None:
    given = lesson()
    outs = [normal(B, R, V, seed=j).requires_grad_() for j in range(3)]
    unrolled_loss(outs, given, ce_weight=0.1, decay=0.8)[0].backward()
    for j, out in enumerate(outs):
        assert out.grad is not None
        exists = torch.arange(R) + j < torch.tensor([[5], [2]])
        assert torch.equal(out.grad.abs().sum(-1) > 0, exists)


def test_block_loss_routes_its_gradients() -> None:
    """Tokens weigh exp(-k / 4), nothing beyond the answer; the confidence head's loss moves the confidence alone."""
    given, anchors = lesson(), torch.tensor([[0, 3], [0, 1]])
    logits, confidence = normal(B, 2, 4, V).requires_grad_(), normal(B, 2, 4, seed=2).requires_grad_()
    block_loss(logits, confidence, anchors, given)[0].backward()
    assert logits.grad is not None and confidence.grad is not None
    valid = torch.tensor([[[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 1, 0, 0], [1, 0, 0, 0]]]).bool()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, valid) and torch.equal(confidence.grad != 0, valid)
    with_other = logits.detach().clone().requires_grad_()
    block_loss(with_other, confidence.detach() + 3, anchors, given)[0].backward()
    torch.testing.assert_close(with_other.grad, logits.grad)
    told = given.logits.gather(1, torch.tensor([[0, 1, 2, 3], [0, 1, 1, 1]])[..., None].expand(-1, -1, V))[:, None]
    loss, metrics = block_loss(told, torch.full((B, 1, 4), 20.0), anchors[:, :1], given, ce_weight=0.0, tv_weight=1.0)
    assert loss.item() < 1e-5 and metrics["rate_1"] == 1 and metrics["tv"] < 1e-6


@pytest.mark.parametrize(
    ("rows", "count", "rounds", "tokens"),
    [
        ([[0, 0]] * 4, 4, 4, 4),
        ([[1, 1]] * 4, 4, 2, 4),  # three tokens, then one that the answer still has
        ([[1, 0], [0, 0], [1, 1], [0, 0], [0, 0]], 5, 2, 5),
    ],
)
def test_simulated_rounds(rows: list[list[int]], count: int, rounds: int, tokens: int) -> None:
    stats = simulate(torch.tensor([rows]).bool(), torch.tensor([count]))[0]
    assert (stats.rounds, stats.tokens) == (rounds, tokens)
