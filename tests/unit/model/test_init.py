"""Repairs of a model's scale."""

from __future__ import annotations

import torch

from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig, LLMConfig, ViTConfig
from hyperbagel.model.init import fresh_bagel, shrink_writes
from hyperbagel.model.qwen2_mot import Streams

CONFIG = BagelConfig(
    llm=LLMConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, vocab_size=64,
        max_position_embeddings=64,
    ),
    vit=ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8),
)  # fmt: skip


def overgrown() -> Bagel:
    """A model whose layers write thousands of times what they are given."""
    model = fresh_bagel(CONFIG, torch.Generator().manual_seed(0), std=0.3).eval()
    with torch.no_grad():
        for layer in model.language_model.model.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight):
                weight.mul_(30)
        model.language_model.model.embed_tokens.weight.mul_(0.01)
    return model


def stream(model: Bagel) -> tuple[torch.Tensor, list[float]]:
    """Logits of some text, and the norm of the residual stream after each layer."""
    ids = torch.arange(1, 11)[None]
    taps: list[Streams] = []
    with torch.no_grad():
        hidden = model.backbone(Streams(model.embed_text(ids), None), torch.arange(10)[None], mask=None, taps=taps)
        assert hidden.u is not None
        return model.logits(hidden.u), [float(t.u.norm(dim=-1).mean()) for t in taps if t.u is not None]


def test_shrunk_writes_leave_text_as_it_was_where_the_stream_had_outgrown_its_input() -> None:
    model = overgrown()
    before, sizes = stream(model)
    shrink_writes(model, 30)
    after, smaller = stream(model)
    assert all(b / 33 < a < b / 27 for b, a in zip(sizes, smaller))
    assert (after - before).norm() < 0.02 * before.norm()


def test_a_healthy_model_is_changed_by_it() -> None:
    model = fresh_bagel(CONFIG, torch.Generator().manual_seed(0), std=0.3).eval()
    before, _ = stream(model)
    shrink_writes(model, 30)
    assert (stream(model)[0] - before).norm() > 0.1 * before.norm()


def test_the_generation_expert_is_left_alone() -> None:
    model = overgrown()
    old = {name: p.clone() for name, p in model.named_parameters()}
    shrink_writes(model, 30)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert len(changed) == 9 and not any("moe_gen" in name for name in changed)
