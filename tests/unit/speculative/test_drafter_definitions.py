"""Drafters against their descriptions, not against themselves: forwards written a second time from the stored tensors, what a fresh
drafter takes from its target, and the block kind's loss by hand.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "parity"))
from parity_world import CONFIG, make_parts, photo
from test_block_tree import paths_of

from hyperbagel.generate.session import Parts, Session
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.init import fresh_bagel
from hyperbagel.model.weights import load_tensors
from hyperbagel.speculative.drafters.autoregressive import Lesson
from hyperbagel.speculative.drafters.block import BlockDrafter
from hyperbagel.speculative.drafters.config import DrafterConfig, Kind
from hyperbagel.speculative.drafters.eagle3 import Eagle3
from hyperbagel.speculative.drafters.export import export_eagle3
from hyperbagel.speculative.drafters.folder import Module, make_drafter, make_module, save_drafter
from hyperbagel.speculative.drafters.hyper_bagel import HyperBagelDrafter
from hyperbagel.speculative.drafters.lesson import make_lesson
from hyperbagel.speculative.types import Draft, Seen
from hyperbagel.train.losses.drafter import block_loss

L, E, DEPTH, BRANCH = 8, 32, 4, 3
LOW, MIDDLE, HIGH = 2, L // 2, L - 3  # states that enter these layers: three different ones
TAPS = tuple(range(L + 1))
Weights = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def parts() -> Parts:
    """A target of which no two tensors are alike: norms and biases are random as well."""
    llm = CONFIG.llm.model_copy(update={"num_hidden_layers": L, "rms_norm_eps": 0.05, "rope_theta": 300.0})
    model = fresh_bagel(CONFIG.model_copy(update={"llm": llm}), torch.Generator().manual_seed(0), std=0.3).eval().requires_grad_(False)
    shake(model, torch.Generator().manual_seed(1))
    return replace(make_parts(), model=model)


@torch.no_grad()
def shake(module: torch.nn.Module, g: torch.Generator) -> None:
    for weights in module.parameters():
        weights.add_(torch.randn(weights.shape, generator=g) * 0.2)


@pytest.fixture(scope="module")
@torch.inference_mode()
def session(parts: Parts) -> Session:
    """A picture, whose tokens share a position, and a text: slots are not positions."""
    made = Session.new(parts, TAPS)
    made.add_image(photo(30, 20), latents=False)
    made.add_text("what is this")
    assert made.position < made.cache.lengths[0]
    return made


def fresh(kind: Kind, parts: Parts, **own: object) -> Module:
    module = make_module(DrafterConfig.for_target(kind, parts.model.config.llm, **own))
    module.init_from(parts.model, torch.Generator().manual_seed(2))
    return module


# -- forwards, written a second time -------------------------------------------------------------------------------------------------


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE as complex numbers: value i and value i + D / 2 of a head are one of them. x [H, S, D]."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention(w: Weights, at: str, x: Tensor, positions: Tensor, config: Mapping[str, float]) -> Tensor:
    """Causal, grouped heads; biases and norms of queries and keys where the tensors hold some. x [S, width]."""
    heads, kv_heads, d = int(config["heads"]), int(config["kv_heads"]), E // int(config["heads"])
    q, k, v = (F.linear(x, w[f"{at}.{n}_proj.weight"], w.get(f"{at}.{n}_proj.bias")).view(len(x), -1, d).transpose(0, 1) for n in "qkv")
    if f"{at}.q_norm.weight" in w:
        q, k = rms(q, w[f"{at}.q_norm.weight"], config["eps"]), rms(k, w[f"{at}.k_norm.weight"], config["eps"])
    q, k = turn(q, positions, config["theta"]), turn(k, positions, config["theta"])
    k, v = (y.repeat_interleave(heads // kv_heads, dim=0) for y in (k, v))
    scores = (q @ k.mT / d**0.5).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w[f"{at}.o_proj.weight"].T


def mlp(w: Weights, at: str, x: Tensor) -> Tensor:
    gate, up, down = (w[f"{at}.{n}_proj.weight"].T for n in ("gate", "up", "down"))
    return (F.silu(x @ gate) * (x @ up)) @ down


def decoder_layer(w: Weights, at: str, x: Tensor, positions: Tensor, c: Mapping[str, float]) -> Tensor:
    x = x + attention(w, f"{at}.self_attn", rms(x, w[f"{at}.input_layernorm.weight"], c["eps"]), positions, c)
    return x + mlp(w, f"{at}.mlp", rms(x, w[f"{at}.post_attention_layernorm.weight"], c["eps"]))


class Eagle3Again:
    """EAGLE-3 from the published tensors: x = [norm(token); norm(h)], the residual is h itself, logits head(norm(out))."""

    def __init__(self, w: Weights, c: Mapping[str, float]) -> None:
        self.w, self.c = w, c

    def encode(self, states: Tensor, positions: Tensor) -> Tensor:
        return torch.cat([states[:, LOW], states[:, MIDDLE], states[:, HIGH]], dim=-1) @ self.w["fc.weight"].T

    def step(self, h: Tensor, token: Tensor, positions: Tensor) -> Tensor:
        w, eps = self.w, self.c["eps"]
        x = torch.cat([rms(token, w["midlayer.input_layernorm.weight"], eps), rms(h, w["midlayer.hidden_norm.weight"], eps)], dim=-1)
        h = h + attention(w, "midlayer.self_attn", x, positions, self.c)
        return h + mlp(w, "midlayer.mlp", rms(h, w["midlayer.post_attention_layernorm.weight"], eps))

    def head(self, h: Tensor) -> Tensor:
        return rms(h, self.w["norm.weight"], self.c["eps"]) @ self.w["lm_head.weight"].T


class HyperBagelAgain(Eagle3Again):
    """Hyper-Bagel, as docs and paper have it: queries over what leaves each layer; fc2 reads [token; feature]; N layers."""

    def encode(self, states: Tensor, positions: Tensor) -> Tensor:
        w, heads = self.w, int(self.c["heads"])
        seen = rms(states[:, 1:], w["meta.norm.weight"], self.c["eps"]) + w["meta.depth"]  # [S, L, E]
        q, k, v = (y @ w[f"meta.{n}_proj.weight"].T for n, y in zip("qkv", (w["meta.queries"], seen, seen)))
        q, k, v = q.view(3, heads, -1), k.view(len(k), L, heads, -1), v.view(len(v), L, heads, -1)
        weights = (torch.einsum("qhd,slhd->shql", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        found = torch.einsum("shql,slhd->sqhd", weights, v).flatten(2) @ w["meta.o_proj.weight"].T  # [S, 3, E]
        skip = states[:, [LOW, MIDDLE, HIGH]]
        x = states[:, HIGH] + (skip + found).flatten(1) @ w["fc1.weight"].T
        return decoder_layer(w, "dec", x, positions, self.c)

    def step(self, h: Tensor, token: Tensor, positions: Tensor) -> Tensor:
        w, eps = self.w, self.c["eps"]
        both = torch.cat([rms(token, w["token_norm.weight"], eps), rms(h, w["feature_norm.weight"], eps)], dim=-1)
        x = h + both @ w["fc2.weight"].T
        for i in range(2):
            x = decoder_layer(w, f"layers.{i}", x, positions, self.c)
        return x


@torch.inference_mode()
def drafted(module: Module, session: Session, threshold: float = 0.0, nodes: int = 0) -> Draft:
    """What the served chain draws at temperature 1 after the context; its q are the softmax of its logits."""
    drafter = make_drafter(module, session.parts.model, depth=DEPTH, nodes=nodes, branch=BRANCH)
    drafter.threshold = threshold
    drafter.begin([session], 1.0, [torch.Generator().manual_seed(3)])
    root, position = torch.tensor([session.parts.tokenizer.im_start]), torch.tensor([session.position])
    return drafter.propose(Seen(session.cache, [0], session.cache.lengths, [[]], root, position), DEPTH)


def read(session: Session) -> tuple[Tensor, Tensor]:
    """The context's hidden states [S, L + 1, E] and positions [S]."""
    n, cache = session.cache.lengths[0], session.cache
    return torch.stack([cache.tapped[cache.taps.index(i)][0, 0, :n] for i in TAPS], dim=1), cache.positions[0][0, 0, :n, 0].float()


@torch.inference_mode()
def told(reader: Eagle3Again, session: Session, tokens: list[int]) -> Tensor:
    """Log-probabilities [DEPTH, Vd] before each of the drafted tokens, the whole sequence read anew every time."""
    model, (states, where) = session.parts.model, read(session)
    following = torch.cat([states[1:, 0], model.embed_text(torch.tensor([session.parts.tokenizer.im_start]))])
    h, out = reader.encode(states, where), []
    for token in tokens:
        last = reader.step(h, following, where)[-1:]
        out.append(reader.head(last)[0].log_softmax(-1))
        h, following = torch.cat([h, last]), torch.cat([following, model.embed_text(torch.tensor([token]))])
        where = torch.cat([where, where[-1:] + 1])
    return torch.stack(out)


def grown(reader: Eagle3Again, session: Session) -> set[tuple[int, ...]]:
    """All nodes of EAGLE-2's tree, path by path: of each level the BRANCH likeliest are expanded."""
    frontier, found = {(): 0.0}, set()
    for _ in range(DEPTH):
        next_ = {path: told(reader, session, [*path, 0])[-1].topk(BRANCH) for path in frontier}
        level = {(*path, int(i)): frontier[path] + float(x) for path, best in next_.items() for x, i in zip(*best)}
        found |= set(level)
        frontier = dict(sorted(level.items(), key=lambda item: -item[1])[:BRANCH])
    return found


@pytest.mark.parametrize("small", [None, 300])
def test_eagle3_is_what_its_export_says(small: int | None, parts: Parts, session: Session, tmp_path: Path) -> None:
    """The folder that SGLang and vLLM load, read by nothing of ours, gives the served drafter's logits at every step."""
    module = fresh("eagle3", parts, draft_vocab=small)
    assert isinstance(module, Eagle3)
    if small:
        module.set_vocabulary(torch.arange(small) * 3 + 7)
    shake(module.requires_grad_(False), torch.Generator().manual_seed(4))
    draft = drafted(module, session)
    export_eagle3(tmp_path / "e", module, parts.model.config.llm, torch.float32)
    c = json.loads((tmp_path / "e" / "config.json").read_text())
    w = load_tensors(tmp_path / "e" / "model.safetensors")
    config = {"heads": c["num_attention_heads"], "kv_heads": c["num_key_value_heads"], "eps": c["rms_norm_eps"], "theta": c["rope_theta"]}
    ids = w["d2t"] + torch.arange(len(w["d2t"]))
    assert draft.q is not None and draft.tokens.shape == (1, DEPTH)
    torch.testing.assert_close(draft.q[0][:, ids].log(), told(Eagle3Again(w, config), session, draft.tokens[0].tolist()), atol=1e-4, rtol=0)


def test_hyper_bagel_is_what_its_folder_says(parts: Parts, session: Session, tmp_path: Path) -> None:
    """drafter.safetensors and the description alone give the served drafter's logits at every step, and the tree."""
    module = fresh("hyper-bagel", parts)
    assert isinstance(module, HyperBagelDrafter)
    shake(module.requires_grad_(False), torch.Generator().manual_seed(4))
    for layer in module.layers:
        layer.self_attn.o_proj.weight.mul_(3)  # so that nodes differ by what they see
    draft = drafted(module, session)
    save_drafter(tmp_path / "h", module, torch.float32)
    c = json.loads((tmp_path / "h" / "drafter.json").read_text())
    reader = HyperBagelAgain(load_tensors(tmp_path / "h" / "drafter.safetensors"), c | {"theta": c["rope_theta"]})
    assert draft.q is not None and draft.tokens.shape == (1, DEPTH)
    torch.testing.assert_close(draft.q[0].log(), told(reader, session, draft.tokens[0].tolist()), atol=1e-4, rtol=0)
    assert drafted(module, session, threshold=1.1).tokens.shape == (1, DEPTH)  # drawn: no look at chances
    tree = drafted(module, session, nodes=99)
    assert tree.tree is not None
    assert set(paths_of(tree.tokens[0].tolist(), tree.tree.parents[0, 1:].tolist())) == grown(reader, session)


@torch.inference_mode()
def test_a_block_is_what_its_folder_says(parts: Parts, session: Session, tmp_path: Path) -> None:
    """Served and trained: features beside each layer, root and marks, Markov head, confidence."""
    module = fresh("block", parts, layers=2, block=DEPTH, rank=8)
    assert isinstance(module, BlockDrafter)
    shake(module.requires_grad_(False), torch.Generator().manual_seed(4))
    draft = drafted(module, session)
    save_drafter(tmp_path / "b", module, torch.float32)
    w, c = load_tensors(tmp_path / "b" / "drafter.safetensors"), json.loads((tmp_path / "b" / "drafter.json").read_text())
    eps, (states, where) = c["eps"], read(session)
    three = [rms(states[:, at], w[f"feature_norms.{i}.weight"], eps) for i, at in enumerate((LOW, MIDDLE, HIGH))]
    fused = rms(torch.cat(three, dim=-1) @ w["fc.weight"].T, w["context_norm.weight"], eps)
    previous = [session.parts.tokenizer.im_start, *draft.tokens[0].tolist()[:-1]]
    x = w["marks"] + F.pad(parts.model.embed_text(torch.tensor(previous[:1])), (0, 0, 0, DEPTH - 1))
    where = torch.cat([where, session.position + torch.arange(DEPTH)])
    for at in ("layers.0", "layers.1"):
        beside = torch.cat([fused, rms(x, w[f"{at}.input_layernorm.weight"], eps)])
        x = x + attention(w, f"{at}.self_attn", beside, where, c | {"theta": c["rope_theta"]})[-DEPTH:]
        x = x + mlp(w, f"{at}.mlp", rms(x, w[f"{at}.post_attention_layernorm.weight"], eps))
    out, before = rms(x, w["norm.weight"], eps), w["markov_in.weight"][previous]
    want = (out @ w["lm_head.weight"].T + before @ w["markov_out.weight"].T).log_softmax(-1)
    sure = torch.cat([out, before], dim=-1) @ w["confidence.weight"][0] + w["confidence.bias"]
    assert draft.q is not None
    lesson = make_lesson([session], draft.tokens.tolist(), module.layers_read)
    logits, confidence = module.rollout(lesson, parts.model.embed_text, torch.tensor([[0]]))
    got = draft.q[0].log(), logits[0, 0].log_softmax(-1), confidence[0, 0]
    torch.testing.assert_close(got, (want, want, sure), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_meta_queries_look_at_every_layer(parts: Parts) -> None:
    """Each layer's state, changed alone, moves what every query finds at that token, and at no other token."""
    module = fresh("hyper-bagel", parts, zero_init=False)
    assert isinstance(module, HyperBagelDrafter) and module.layers_read == TAPS[1:]
    states = torch.randn(1, 3, L, E, generator=torch.Generator().manual_seed(5))
    before = module.meta(states)
    for layer in range(L):
        changed = states.clone()
        changed[:, 1, layer] = -changed[:, 1, layer]
        moved = (module.meta(changed) - before).abs().view(3, 3, E).amax(-1)  # [slot, query]
        assert (moved[1] > 1e-5).all() and (moved[[0, 2]] == 0).all(), (layer, moved)


# -- what a fresh drafter takes from its target --------------------------------------------------------------------------------------


def same_layer(mine: torch.nn.Module, target: Bagel, layer: int) -> bool:
    theirs = target.language_model.model.layers[layer].state_dict()
    return all(torch.equal(x, theirs[name]) for name, x in mine.state_dict().items())


@pytest.mark.parametrize("zero_init", [True, False])
def test_hyper_bagel_starts_as_the_targets_last_layers(zero_init: bool, parts: Parts) -> None:
    """Two draft layers, the last ones; Dec the one before; norm and head; and which projections are zero: no more, no fewer."""
    module, target = fresh("hyper-bagel", parts, zero_init=zero_init), parts.model
    assert isinstance(module, HyperBagelDrafter) and len(module.layers) == 2
    zeros = {name for name, x in module.named_parameters() if x.ndim > 1 and not x.any()}
    own = {"meta.o_proj.weight", "dec.self_attn.o_proj.weight", "dec.mlp.down_proj.weight", "fc1.weight", "fc2.weight"}
    assert zeros == (own if zero_init else set())
    assert [same_layer(mine, target, at) for mine, at in zip(module.layers, (L - 2, L - 1), strict=True)] == [True, True]
    assert same_layer(module.dec, target, L - 3) == (not zero_init)
    assert torch.equal(module.dec.self_attn.q_proj.weight, target.language_model.model.layers[L - 3].self_attn.q_proj.weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(module.lm_head.weight, target.language_model.lm_head.weight)
    assert torch.equal(module.norm.weight, target.language_model.model.norm.weight)


def test_a_block_drafter_starts_as_the_targets_last_layers(parts: Parts) -> None:
    module, target = fresh("block", parts, layers=2, block=4, rank=8), parts.model
    assert isinstance(module, BlockDrafter)
    assert [same_layer(mine, target, at) for mine, at in zip(module.layers, (L - 2, L - 1), strict=True)] == [True, True]
    assert torch.equal(module.lm_head.weight, target.language_model.lm_head.weight)
    assert torch.equal(module.norm.weight, target.language_model.model.norm.weight)
    assert {name for name, x in module.named_parameters() if not x.any()} >= {"markov_out.weight", "confidence.weight"}


def test_eagle3_starts_with_the_targets_rows(parts: Parts) -> None:
    """Its head is the target's, of the tokens that it can say; everything else is its own, normal with deviation 0.02."""
    module, ids = make_module(DrafterConfig.for_target("eagle3", parts.model.config.llm, draft_vocab=50)), torch.arange(50) * 2 + 5
    assert isinstance(module, Eagle3)
    module.set_vocabulary(ids)
    module.init_from(parts.model, torch.Generator().manual_seed(2))
    assert torch.equal(module.lm_head.weight, parts.model.language_model.lm_head.weight[ids])
    own = [x for name, x in module.named_parameters() if x.ndim > 1 and name != "lm_head.weight"]
    assert len(own) == 8 and all(0.018 < float(x.detach().std()) < 0.022 for x in own)


def test_how_many_layers_each_kind_has(parts: Parts) -> None:
    """EAGLE-3 has one draft layer, Hyper-Bagel N = 2 behind Dec; each draft layer and Dec remember."""
    modules = {kind: fresh(kind, parts) for kind in ("eagle3", "hyper-bagel")}
    assert {kind: m.config.layers for kind, m in modules.items()} == {"eagle3": 1, "hyper-bagel": 2}
    assert {kind: m.memory_layers for kind, m in modules.items()} == {"eagle3": 1, "hyper-bagel": 3}


# -- the loss of blocks --------------------------------------------------------------------------------------------------------------


def test_block_loss_by_hand() -> None:
    """0.1 CE + 0.9 TV + the confidence head's cross-entropy, token k weighted exp(-k / 4), over the weights of tokens that exist."""
    v, counts, anchors, g = 7, [5, 2], torch.tensor([[0, 3], [0, 1]]), torch.Generator().manual_seed(0)
    logits, confidence, target = torch.randn(2, 2, 4, v, generator=g), torch.randn(2, 2, 4, generator=g), torch.randn(2, 5, v, generator=g)
    nothing = torch.zeros(2, 8, 3)
    where, tokens = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    lesson = Lesson(nothing[:, :, None], nothing, where, torch.tensor([2, 4]), torch.tensor(counts), tokens, target)
    total = weights = 0.0
    for k, weight in enumerate((1.0, 0.778801, 0.606531, 0.472367)):  # exp(-k / 4)
        for b, a in ((0, 0), (0, 1), (1, 0), (1, 1)):
            entry = int(anchors[b, a]) + k
            if entry >= counts[b]:
                continue
            p, q = target[b, entry].double().softmax(-1).tolist(), logits[b, a, k].double().softmax(-1).tolist()
            tv = sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
            c = 1 / (1 + math.exp(-float(confidence[b, a, k])))
            trust = -(1 - tv) * math.log(c) - tv * math.log(1 - c)
            total += weight * (-0.1 * math.log(q[p.index(max(p))]) + 0.9 * tv + trust)
            weights += weight
    assert block_loss(logits, confidence, anchors, lesson)[0].item() == pytest.approx(total / weights, rel=1e-5)
