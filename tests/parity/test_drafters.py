"""Drafters: trained and served from one definition, lossless when trained, folders, export, wrong targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_world import mixed_sessions, text_sessions

from hyperbagel.core.errors import InputError
from hyperbagel.generate.decode import decode as plain_decode
from hyperbagel.generate.session import Parts
from hyperbagel.model.config import LLMConfig
from hyperbagel.model.weights import load_tensors, save_tensors
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.decode import decode
from hyperbagel.speculative.drafters import hyper_bagel
from hyperbagel.speculative.drafters.autoregressive import DraftModule, Lesson
from hyperbagel.speculative.drafters.block import BlockDrafter, block_mask
from hyperbagel.speculative.drafters.choice import choose
from hyperbagel.speculative.drafters.config import DrafterConfig, Kind
from hyperbagel.speculative.drafters.eagle3 import Eagle3
from hyperbagel.speculative.drafters.expand import best_nodes, grow
from hyperbagel.speculative.drafters.export import IDS, export_eagle3, import_eagle3
from hyperbagel.speculative.drafters.folder import Module, load_module, make_drafter, make_module, save_drafter
from hyperbagel.speculative.drafters.layers import diagonal_mask
from hyperbagel.speculative.drafters.lesson import make_lesson
from hyperbagel.speculative.drafters.serve_blocks import BlockProposer
from hyperbagel.speculative.simulate import simulate
from hyperbagel.speculative.types import Seen, Speculated, Stats
from hyperbagel.train.losses.drafter import block_loss, unrolled_loss

KINDS: list[Kind] = ["eagle3", "hyper-bagel", "block"]
TAPS = (0, 1, 2, 3, 4, 5)
DEPTH, LENGTH = 4, 14


def fresh(kind: Kind, parts: Parts, **own: object) -> Module:
    config = DrafterConfig.for_target(kind, parts.model.config.llm, **({"block": DEPTH, "rank": 8} if kind == "block" else {}), **own)
    module = make_module(config)
    module.init_from(parts.model, torch.Generator().manual_seed(0))
    return module


def anchors_of(lesson: Lesson) -> torch.Tensor:
    return torch.arange(lesson.tokens.shape[1]).expand(len(lesson.tokens), -1)


def loss_of(module: Module, lesson: Lesson, parts: Parts) -> torch.Tensor:
    embed = parts.model.embed_text
    if isinstance(module, BlockDrafter):
        anchors = anchors_of(lesson)
        return block_loss(*module.rollout(lesson, embed, anchors), anchors, lesson)[0]
    return unrolled_loss(module.rollout(lesson, embed, DEPTH), lesson, ce_weight=0.1, decay=0.8)[0]


@pytest.fixture(scope="module")
def trained(parts: Parts) -> dict[str, tuple[Module, list, list, list[float]]]:
    """Each kind, overfitted to the model's answers to a few prompts (texts, pictures, latents, turns)."""
    parts.model.requires_grad_(False)
    sessions = [*mixed_sessions(parts, TAPS), *text_sessions(parts, 6, seed=3, taps=TAPS)]
    answers = plain_decode(sessions, max_tokens=LENGTH)
    made = {}
    for kind in KINDS:
        module = fresh(kind, parts)
        lesson = make_lesson(sessions, [out.ids for out in answers], module.layers_read)
        optimizer = torch.optim.Adam(module.parameters(), lr=8e-3)
        losses = []
        for _ in range(30):
            loss = loss_of(module, lesson, parts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        made[kind] = (module.eval().requires_grad_(False), sessions, answers, losses)
    return made


@torch.no_grad()
def drafts_of(module: Module, lesson: Lesson, parts: Parts) -> torch.Tensor:
    """Teacher-forced greedy drafts [B, R, K]."""
    if isinstance(module, BlockDrafter):
        return module.rollout(lesson, parts.model.embed_text, anchors_of(lesson))[0].argmax(-1)
    return torch.stack([out.argmax(-1) for out in module.rollout(lesson, parts.model.embed_text, DEPTH)], dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_is_learnt(kind: Kind, trained) -> None:
    losses = trained[kind][3]
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_serving_accepts_what_training_says(kind: Kind, trained, parts: Parts) -> None:
    """The engine's rounds, tokens and acceptance by depth equal those told from teacher-forced logits, exactly."""
    module, sessions, answers, _ = trained[kind]
    lesson = make_lesson(sessions, [out.ids for out in answers], module.layers_read)
    best = torch.stack([lesson.logits.argmax(-1).roll(-k, dims=1) for k in range(DEPTH)], dim=-1)
    valid = torch.stack([lesson.valid(k) for k in range(DEPTH)], dim=-1)
    stopped = torch.tensor([out.finish_reason == "stop" for out in answers])
    told = simulate((drafts_of(module, lesson, parts) == best) & valid, lesson.counts - 1 + stopped.long())
    pooled = Stats()
    for session, stats in zip(sessions, told, strict=True):
        out = decode([session], max_tokens=LENGTH, drafter=make_drafter(module, parts.model, depth=DEPTH))[0]
        assert isinstance(out, Speculated)
        assert (out.stats.rounds, out.stats.tokens) == (stats.rounds, stats.tokens)
        if out.finish_reason == "stop":
            assert (out.stats.tried, +out.stats.accepted) == (stats.tried, +stats.accepted)
        pooled.add(out.stats)
    assert pooled.tau > 1.3


@pytest.mark.parametrize(
    ("kind", "nodes"), [("eagle3", 0), ("eagle3", 9), ("hyper-bagel", 0), ("hyper-bagel", 9), ("block", 0), ("block", 9)]
)
def test_answers_stay_the_targets(kind: Kind, nodes: int, trained, parts: Parts) -> None:
    """Together and alone, on prompts it knows and on others; a tree accepts at least as much as a chain does on the former."""
    module, known, answers, _ = trained[kind]
    other = text_sessions(parts, 20, seed=9, taps=TAPS)
    for sessions, plain in ((known, answers), (other, plain_decode(other, max_tokens=LENGTH))):
        out = decode(sessions, max_tokens=LENGTH, drafter=make_drafter(module, parts.model, depth=DEPTH, nodes=nodes, branch=3))
        assert [(o.ids, o.finish_reason) for o in out] == [(p.ids, p.finish_reason) for p in plain]
    if nodes:
        chain = decode(known, max_tokens=LENGTH, drafter=make_drafter(module, parts.model, depth=DEPTH))
        tree = decode(known, max_tokens=LENGTH, drafter=make_drafter(module, parts.model, depth=DEPTH, nodes=12, branch=3))
        total = [sum(o.stats.rounds for o in rows if isinstance(o, Speculated)) for rows in (chain, tree)]
        assert total[1] <= total[0]


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_drafts_come_with_their_distribution(kind: Kind, trained, parts: Parts) -> None:
    module, sessions, _, _ = trained[kind]
    made = []
    for _ in range(2):
        generators = [torch.Generator().manual_seed(i) for i in range(len(sessions))]
        made.append(
            decode(sessions, max_tokens=8, temperature=0.8, generators=generators, drafter=make_drafter(module, parts.model, depth=3))
        )
    assert [o.ids for o in made[0]] == [o.ids for o in made[1]]
    assert any(o.stats.accepted[1] for o in made[0] if isinstance(o, Speculated))


def test_the_drawn_masks() -> None:
    picture = [[1, 1, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0, 1]]
    assert diagonal_mask(torch.tensor([[1, 2]]), 3, 2).int().tolist() == [[picture]]
    picture = [[1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 1]]
    assert block_mask(torch.tensor([[0, 2]]), 3, 2).int().tolist() == [[picture]]


def test_zero_init_starts_as_the_targets_last_layers(parts: Parts) -> None:
    """With zero-initialised projections token embeddings and meta queries say nothing yet; without them they do."""
    sessions = text_sessions(parts, 3, taps=TAPS)
    lesson = make_lesson(sessions, [[5, 6], [7], [8, 9, 10]], (1, 2, 3, 4, 5))
    for zero in (True, False):
        module = fresh("hyper-bagel", parts, zero_init=zero)
        assert isinstance(module, DraftModule)
        same = [module.rollout(lesson, lambda ids, m=m: parts.model.embed_text(ids) * m, 2)[1] for m in (1.0, 3.0)]  # type: ignore[misc]
        assert torch.equal(same[0], same[1]) == zero


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(kind: Kind, parts: Parts) -> None:
    """A gradient reaches all of the drafter within a few steps (zeros open one after the other), and nothing of the target."""
    parts.model.requires_grad_(False)
    sessions = text_sessions(parts, 4, taps=TAPS)
    module = fresh(kind, parts)
    lesson = make_lesson(sessions, [[5, 6, 9], [7, 3], [8, 9, 10], [4]], module.layers_read)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(module, lesson, parts).backward()
        optimizer.step()
    dead = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == [] and all(p.grad is None for p in parts.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_folder_round_trip(kind: Kind, trained, parts: Parts, tmp_path: Path) -> None:
    module = trained[kind][0]
    save_drafter(tmp_path / "d", module, torch.float32)
    again = load_module(tmp_path / "d", parts.model)
    assert again.config == module.config
    assert all(torch.equal(x, y) for x, y in zip(again.state_dict().values(), module.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 64}, "hidden size 64"),
        ({"vocab_size": 999}, "vocabulary 999"),
        ({"target_layers": 7}, "layers 7"),
        ({"kind": "eagle9"}, "eagle9"),
        ({"colour": 1}, "unknown key 'colour'"),
    ],
)
def test_wrong_folders(change: dict[str, object], words: str, parts: Parts, tmp_path: Path) -> None:
    save_drafter(tmp_path / "d", fresh("eagle3", parts))
    path = tmp_path / "d" / "drafter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=words):
        load_module(tmp_path / "d", parts.model)


def test_damaged_folders(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"drafter\.json"):
        load_module(tmp_path, parts.model)
    save_drafter(tmp_path / "d", fresh("eagle3", parts))
    weights = tmp_path / "d" / "drafter.safetensors"
    tensors = load_tensors(weights)
    save_tensors(weights, tensors | {"norm.weight": torch.full((32,), float("nan"))})
    with pytest.raises(InputError, match="not finite"):
        load_module(tmp_path / "d", parts.model)
    for name, value in (("d2t", tensors["d2t"] + 2000), ("d2t", tensors["d2t"] - 1), ("d2t", tensors["d2t"].float())):
        save_tensors(weights, tensors | {name: value})
        with pytest.raises(InputError, match=f"got {name}"):
            load_module(tmp_path / "d", parts.model)
    save_tensors(weights, tensors | {"lm_head.weight": tensors["lm_head.weight"].int()})
    with pytest.raises(InputError, match=r"got lm_head\.weight as torch\.int32"):
        load_module(tmp_path / "d", parts.model)
    save_tensors(weights, {k: v for k, v in tensors.items() if k != "fc.weight"})
    with pytest.raises(InputError, match=r"missing fc\.weight"):
        load_module(tmp_path / "d", parts.model)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="safetensors"):
        load_module(tmp_path / "d", parts.model)
    (tmp_path / "d" / "drafter.json").write_text("[]")
    with pytest.raises(InputError, match="list"):
        load_module(tmp_path / "d", parts.model)


def test_a_drafter_that_overflows_costs_no_request(parts: Parts) -> None:
    """Sampling from logits that are not finite: any token, and q says so, so that acceptance stays lossless."""
    logits = torch.tensor([[float("nan"), 1.0, 2.0, 0.0], [0.0, float("inf"), 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]])
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    tokens, q = choose(logits, 1.0, generators)
    assert q is not None and tokens.shape == (3,) and torch.equal(q[:2], torch.full((2, 4), 0.25))
    torch.testing.assert_close(q[2], logits[2].softmax(-1))


@pytest.mark.parametrize("small", [None, 40])
def test_eagle3_export_reads_back(small: int | None, parts: Parts, tmp_path: Path) -> None:
    """The published keys, shapes and configuration; equal logits after reading."""
    module = fresh("eagle3", parts, draft_vocab=small)
    assert isinstance(module, Eagle3)
    llm: LLMConfig = parts.model.config.llm
    if small:
        module.set_vocabulary(torch.arange(0, 3 * small, 3))
    export_eagle3(tmp_path / "e", module, llm, torch.float32)
    tensors = load_tensors(tmp_path / "e" / "model.safetensors")
    norms = {f"midlayer.{n}.weight" for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
    attention = {f"midlayer.self_attn.{n}_proj.weight" for n in "qkvo"}
    mlp = {f"midlayer.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert set(tensors) == {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"} | norms | attention | mlp
    assert tensors["fc.weight"].shape == (32, 96) and tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    assert tensors["t2d"].dtype == torch.bool and tensors["d2t"].dtype == torch.int64
    if small:
        assert tensors["d2t"].tolist() == [2 * i for i in range(small)] and tensors["t2d"].nonzero().flatten().tolist() == list(
            range(0, 120, 3)
        )
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == (small or llm.vocab_size)
    levels = list(module.config.levels)
    assert config["eagle_aux_hidden_state_layer_ids"] == levels  # vLLM: layers by what enters them
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [level - 1 for level in levels]  # SGLang adds one
    again = import_eagle3(tmp_path / "e", llm)
    lesson = make_lesson(text_sessions(parts, 3, taps=TAPS), [[5, 6], [7], [8, 9, 10]], module.layers_read)
    with torch.no_grad():
        pairs = zip(*(m.rollout(lesson, parts.model.embed_text, 3) for m in (module, again)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        if small:
            assert torch.isfinite(module.rollout(lesson, parts.model.embed_text, 1)[0]).sum(-1).unique().tolist() == [small]
    with pytest.raises(InputError, match="hidden size 32"):
        import_eagle3(tmp_path / "e", llm.model_copy(update={"hidden_size": 64}))
    others: list[dict[str, Any]] = [{"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, {"eagle_config": {IDS: [2, 2, 2]}}]  # of other layers
    for change in ({"draft_vocab_size": 5000}, {"hidden_size": "abc"}, {"rope_theta": None}, *others):
        (tmp_path / "e" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=r"config\.json"):
            import_eagle3(tmp_path / "e", llm)
    newer = config | {"rope_parameters": {"rope_theta": 500.0}}  # transformers 5
    del newer["rope_theta"]
    (tmp_path / "e" / "config.json").write_text(json.dumps(newer))
    assert import_eagle3(tmp_path / "e", llm).config.rope_theta == 500.0
    (tmp_path / "e" / "config.json").write_text(json.dumps(config))
    save_tensors(tmp_path / "e" / "model.safetensors", tensors | {"fc.weight": tensors["fc.weight"] * float("nan")})
    with pytest.raises(InputError, match="not finite"):
        import_eagle3(tmp_path / "e", llm)
    (tmp_path / "e" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(InputError, match="EAGLE-3"):
        import_eagle3(tmp_path / "e", llm)


def test_an_unsure_block_drafts_less(trained, parts: Parts) -> None:
    """The confidence threshold cuts drafts off; answers stay."""
    module, sessions, answers, _ = trained["block"]
    assert isinstance(module, BlockDrafter)
    tried = []
    for threshold in (0.0, 0.6, 1.1):
        out = decode(sessions, max_tokens=LENGTH, drafter=BlockProposer(module, parts.model, threshold=threshold))
        assert [o.ids for o in out] == [p.ids for p in answers]
        tried.append(sum(sum(o.stats.tried.values()) for o in out if isinstance(o, Speculated)))
    assert tried[0] > tried[1] > tried[2] == 0


@pytest.mark.parametrize("nodes", [0, 9])
def test_one_request_alone_drafts_as_in_a_batch(nodes: int, trained, parts: Parts) -> None:
    """A row alone and the same row twice: the same tokens, cut off at the same chance."""
    module, sessions, _, _ = trained["block"]
    assert isinstance(module, BlockDrafter)
    for threshold in (0.0, 0.3, 0.6):
        whole = BlockProposer(module, parts.model, threshold=threshold, nodes=nodes)
        session = sessions[0]
        counts, ids = list(session.cache.lengths), [[]]
        drafts = []
        for rows in (1, 2):
            cache = KVCache.stack([session.cache] * rows, 16, taps=session.cache.taps)
            root, position = torch.full((rows,), parts.tokenizer.im_start), torch.full((rows,), session.position)
            whole.begin([session] * rows, 0.0, ())
            drafts.append(whole.propose(Seen(cache, [0] * rows, counts * rows, ids * rows, root, position), DEPTH).tokens)
        assert drafts[0].shape[1] > 0 or threshold > 0
        assert drafts[0].tolist() == drafts[1][:1].tolist() == drafts[1][1:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_finished_rows_do_not_end_a_chain(kind: Kind, trained, parts: Parts) -> None:
    """Rows end together by the mean of their chances, or once all have said im_end; a row that needs no draft has no say."""
    module, sessions, _, _ = trained[kind]
    lengths = []
    for threshold in (*(i / 30 for i in range(30)), 0.98, 0.99, 0.995):
        drafter = make_drafter(module, parts.model, depth=DEPTH)
        drafter.threshold = threshold
        drafts = []
        for others in ([], sessions[1:4]):
            rows = [sessions[0], *others]
            cache = KVCache.stack([s.cache for s in rows], 16, taps=sessions[0].cache.taps)
            root, position = torch.full((len(rows),), parts.tokenizer.im_start), torch.tensor([s.position for s in rows])
            counts = [cache.lengths[0], *[0] * len(others)]
            drafter.begin(rows, 0.0, ())
            seen = Seen(cache, [0] * len(rows), counts, [[]] * len(rows), root, position)
            drafts.append(drafter.propose(seen, DEPTH).tokens[0].tolist())
            if not threshold:
                drafter.begin(rows, 0.0, ())
                drafter.im_end = drafts[-1][0]
                assert drafter.propose(seen, DEPTH).tokens[0].tolist() == drafts[-1][:1]
        assert drafts[0] == drafts[1]
        lengths.append(len(drafts[0]))
    assert lengths[0] > lengths[-1]


def test_a_large_vocabulary_has_no_table(trained, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Markov head is then asked token by token: the same trees, and answers that are the target's."""
    module, sessions, answers, _ = trained["block"]
    tabled = make_drafter(module, parts.model, depth=DEPTH, nodes=9)
    monkeypatch.setattr("hyperbagel.speculative.drafters.serve_blocks._TABLE", 10)
    asked = make_drafter(module, parts.model, depth=DEPTH, nodes=9)
    assert isinstance(tabled, BlockProposer) and isinstance(asked, BlockProposer)
    assert tabled.table is not None and asked.table is None
    made = [decode(sessions, max_tokens=LENGTH, drafter=drafter) for drafter in (tabled, asked)]
    assert [o.ids for o in made[0]] == [o.ids for o in made[1]] == [a.ids for a in answers]
    stats = [[o.stats for o in rows if isinstance(o, Speculated)] for rows in made]
    assert stats[0] == stats[1] and sum(s.tokens for s in stats[0]) > 1.5 * sum(s.rounds for s in stats[0])


def test_a_tree_never_loses_a_parent() -> None:
    """Certain children tie with their parents in probability; the parent still comes first."""
    logits = torch.full((1, 1, 8), -40.0)
    logits[..., 3] = 40.0
    levels = [grow(None, logits, 3)]
    for _ in range(4):
        levels.append(grow(levels[-1], logits.expand(1, 3, 8), 3))
    draft = best_nodes(levels, 5)
    assert draft.tree is not None and draft.tree.parents.tolist() == [[0, 0, 1, 2, 3, 4]] and draft.tokens.tolist() == [[3] * 5]


def test_long_contexts_are_read_in_pieces(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta queries look at each token by itself, so what they see does not depend on how many are read at once."""
    module = fresh("hyper-bagel", parts)
    assert isinstance(module, hyper_bagel.HyperBagelDrafter)
    torch.nn.init.normal_(module.meta.o_proj.weight)
    states = torch.randn(2, 7, module.config.target_layers, module.config.hidden_size, generator=torch.Generator().manual_seed(0))
    whole, seen = module.meta(states), []
    monkeypatch.setattr(hyper_bagel, "AT_ONCE", 3)
    look = module.meta._look
    monkeypatch.setattr(module.meta, "_look", lambda piece: (seen.append(len(piece)), look(piece))[1])
    with torch.no_grad():
        torch.testing.assert_close(module.meta(states), whole)
    assert seen == [3, 3, 3, 3, 2]
