"""The planner's stage: it learns what requests will ask of it, behind contexts as requests have them, and touches nothing else."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_base import make, run, write_base

from hyperbagel.core.errors import InputError
from hyperbagel.data.plan import Text, VaeImage
from hyperbagel.folders import describe_folder
from hyperbagel.generate.decode import decode
from hyperbagel.generate.session import Parts, Session
from hyperbagel.model.planner import load_planner, make_planner
from hyperbagel.model.weights import load_folder
from hyperbagel.train.distributed import World
from hyperbagel.train.folder import install_planner
from hyperbagel.train.gate import judge
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import planner

T2I = {"task": "t2i", "samples": 3, "resolution": 32, "think_share": 1.0}
EDIT = {"task": "edit", "samples": 2, "resolution": 32, "think_share": 1.0}
DATA = {"sources": {"t2i": T2I}, "mixture": [{"weights": {"t2i": 1}}]}


def changed(stage: Any) -> None:
    with torch.no_grad():
        for p in stage.planner.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)


def _forced(ids: Iterator[int], *_: object) -> torch.Tensor:
    return torch.tensor([next(ids)])


@pytest.mark.parametrize("source", ["t2i", "edit"])
def test_cross_entropy_is_that_of_a_plan_decoded_behind_a_request_s_context(
    base: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sample alone, token by token: what stands before the plan is read by the model, the plan by the planner."""
    data = {"sources": {source: {"t2i": T2I, "edit": EDIT}[source]}, "mixture": [{"weights": {source: 1}}]}
    stage: Any = make(planner, base, data=data)
    changed(stage)
    groups: list[Any] = []
    monkeypatch.setattr(stage.loader, "next_group", lambda take=stage.loader.next_group: groups.append(take()) or groups[-1])
    batch = stage.batch(0, Draws.at(0))
    loss, told = stage.loss("planner", batch, 0)
    assert told == {f"{source}_ce": loss} and batch.source == source
    parts, total, count = replace(Parts.load(base), model=stage.base), 0.0, 0
    for i, sample in enumerate(groups[0].samples):
        before, plan = planner.split_plan(sample)
        session = Session.new(parts)
        for item in before:
            if isinstance(item, Text):
                session.add_text(parts.tokenizer.decode(list(item.ids)))
        if source == "edit":  # pictures are not repeated here: the context is the stage's own
            length = int(batch.context.seen[i].sum())
            session.cache.reserve(length)
            for mine, theirs in ((session.cache.k, batch.context.k), (session.cache.v, batch.context.v)):
                for j, x in enumerate(theirs):
                    mine[j][0, :, :length] = x[i][:, batch.context.seen[i]]
            session.cache.lengths, session.position, session.waiting = [length], int(batch.context.position[i]), []
        ids = [*plan.ids, parts.tokenizer.im_end]
        monkeypatch.setattr("hyperbagel.generate.decode.pick", partial(_forced, iter(ids)))
        writing = replace(session, parts=replace(parts, model=stage.network))
        [out] = decode([writing], max_tokens=len(ids), keep_logits=True)
        logits = torch.stack(out.logits[: len(ids)])
        total += float(F.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
        count += len(ids)
    assert loss.item() == pytest.approx(total / count, rel=1e-4)


def test_gradients_reach_the_planner_alone(base: Path) -> None:
    stage: Any = make(planner, base, data=DATA)
    changed(stage)
    stage.base.requires_grad_(True)
    loss, _ = stage.loss("planner", stage.batch(0, Draws.at(0)), 0)
    optimised = set(stage.players["planner"].parameters)
    assert optimised == {name for name, _ in stage.planner.named_parameters()} and len(optimised) == 2 * 4 * 2
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.planner.parameters())


def test_a_run_is_measured_gated_installed_and_gone_on_with(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    held_out = {"data": DATA, "held_out": DATA, "held_out_groups": 1, "log_every": 1, "evaluate_every": 4}
    run(planner, base, out, max_steps=8, optim={"lr": 0.02, "warmup_steps": 1}, **held_out)
    verdict = judge(out)
    assert verdict.measure == "score" and verdict.passed and verdict.step > 0
    model, _ = load_folder(base, "cpu", torch.float32)
    kept = load_planner(out / "export", model)
    assert kept.low_rank == make_planner(model, 4).low_rank and kept.scale == 1
    config = out / "export" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4.0', '"lora_alpha": 8'))
    assert load_planner(out / "export", model).scale == 2
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4.0'))
    again: Any = make(planner, base, init=out / "export", **held_out)
    assert again.evaluate(0)["score"] == pytest.approx(verdict.best, abs=2e-3)  # the export is in bf16
    with pytest.raises(InputError, match="got a planner of rank 4, expected 2"):
        make(planner, base, init=out / "export", rank=2, data=DATA)
    report = describe_folder(out / "export")
    assert report["planner"]["rank"] == 4 and report["weights"]["adapter_model"]["parameters"] == sum(p.numel() for p in kept.parameters())

    mine = write_base(tmp_path / "mine")
    assert install_planner(out / "export", mine) == mine / "planner" and load_planner(mine / "planner", model).rank == 4
    install_planner(out / "export", mine)  # replaces the one before
    with pytest.raises(InputError, match="got a planner of another model"):
        install_planner(out / "export", write_base(tmp_path / "other", seed=1))
    (mine / "planner" / "planner.json").unlink()
    with pytest.raises(InputError, match="something there that is no planner"):
        install_planner(out / "export", mine)


def test_plans_may_come_from_files(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (32, 32)).save(picture := io.BytesIO(), "PNG")
    rows = [{"image": picture.getvalue(), "captions": [text], "plans": [f"draw {text}"]} for text in ("a red car", "a key")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    own = {"kind": "t2i", "path": tmp_path / "rows.parquet", "think_share": 1.0, "samples": 2}
    data = {"sources": {"own": own}, "mixture": [{"weights": {"own": 1}}]}
    stage: Any = make(planner, base, data=data, held_out=data, held_out_groups=2)
    assert "held_out: got 2 rows in own, expected 4; rows count twice" in caplog.text
    batch = stage.batch(0, Draws.at(0))
    told = [stage.tokenizer.decode(wanted[seen].tolist()) for wanted, seen in zip(batch.wanted, batch.seen, strict=True)]
    plans = [f"<think>{row['plans'][0]}</think>" for row in rows]
    assert batch.source == "own" and sorted(text.removesuffix("<|im_end|>") for text in told) == sorted(plans)
    assert 0 < stage.loss("planner", batch, 0)[0] < 20


def test_a_sample_without_a_plan_is_refused(base: Path) -> None:
    data = {"sources": {"t2i": {k: v for k, v in T2I.items() if k != "think_share"}}, "mixture": [{"weights": {"t2i": 1}}]}
    with pytest.raises(InputError, match="a sample without a plan"):
        make(planner, base, data=data).batch(0, Draws.at(0))
    picture = VaeImage(torch.zeros(32, 32, 3, dtype=torch.uint8).numpy(), loss=True)
    text, plan = Text([5]), Text([6], loss=True)
    assert planner.split_plan([text, plan, picture, picture]) == ([text], plan)
    for wrong in ([text, picture, plan, picture], [picture], [plan, text]):
        with pytest.raises(InputError, match="a sample without a plan"):
            planner.split_plan(wrong)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("planner.json", "{", "planner.json"),
        ("planner.json", '{"format": 2}', "got format 2, expected 1"),
        ("adapter_config.json", '{"r": true, "lora_alpha": 4}', "got r True and lora_alpha 4, expected 1 to 32"),
        ("adapter_model.safetensors", "x", "adapter_model.safetensors"),
    ],
)
def test_a_damaged_planner_is_named(base: Path, tmp_path: Path, file: str, text: str, told: str) -> None:
    run(planner, base, tmp_path / "run", max_steps=1, data=DATA)
    (tmp_path / "run" / "export" / file).write_text(text)
    with pytest.raises(InputError, match=told):
        load_planner(tmp_path / "run" / "export", load_folder(base, "cpu", torch.float32)[0])


def test_only_the_rank_that_leads_keeps_held_out_contexts(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        monkeypatch.setattr(planner, "join_world", lambda device, rank=rank: World(rank=rank, size=2))
        stage: Any = make(planner, base, data=DATA, held_out=DATA, held_out_groups=2)
        assert len(stage.measured) == (0 if rank else 2) and stage.measures_start
