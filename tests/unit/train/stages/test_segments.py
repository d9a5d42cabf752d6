"""Target `segments` of stage cfg, against the slow way: each state by itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_base import make, only, write_base

from hyperbagel.flow.schedule import shift_time, time_grid, unshift_time
from hyperbagel.flow.solvers import euler
from hyperbagel.train.contexts import Conditions, Context, Scales
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import cfg


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize("source", ["t2i", "edit"])
@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_each_step_of_the_sampler_learns_where_the_teacher_leads(source: str, on_policy: float, base: Path) -> None:
    """The slow way: each state by itself, the guided teacher by the solver's own Euler, at the same scales."""
    stage: Any = make(cfg, base, target="segments", nfe=3, substeps=2, on_policy=on_policy, data=only(source))
    with torch.no_grad():  # a fresh student is the base
        for parameter in stage.student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = stage.batch(0, Draws.at(0))
    grid, rows = time_grid(3, stage.recipe.shift), len(batch.conditions) // 3
    assert torch.equal(batch.t, grid[:-1].repeat(rows))
    for k, half in enumerate([0.5 * (i + j) for i, j in pairwise(unshift_time(grid, stage.recipe.shift).tolist())]):
        own = slice(k, None, 3)
        x, c = batch.x_t[own], sub_conditions(batch.conditions, own)
        times = torch.stack([grid[k], shift_time(torch.tensor(half), stage.recipe.shift), grid[k + 1]])
        end = euler(x, stage.guided_teacher(c, Scales(batch.scales.text[own], batch.scales.image[own])), times)
        torch.testing.assert_close(x - batch.target[own] * (grid[k] - grid[k + 1]), end, rtol=1e-3, atol=1e-4)
        if on_policy and k:  # the student's own step led here
            before = slice(k - 1, None, 3)
            run = stage.as_velocity(stage.network, c, Scales(batch.scales.text[own], batch.scales.image[own]))
            stepped = batch.x_t[before] - run(batch.x_t[before], float(grid[k - 1])) * (grid[k - 1] - grid[k])
            torch.testing.assert_close(stepped, x, rtol=1e-3, atol=1e-4)
    assert batch.x_t[::3].std() > 0.9  # the first step starts from noise


def sub_conditions(c: Conditions, rows: slice) -> Conditions:
    """Some rows alone."""

    def of(context: Context) -> Context:
        return Context([x[rows] for x in context.k], [x[rows] for x in context.v], context.seen[rows], context.position[rows])

    full, text = of(c.full), of(c.text_dropped)
    image = full if c.image_dropped is c.full else of(c.image_dropped)
    return replace(
        c, where=c.where[rows], x0=c.x0[rows], markers=c.markers[rows], full=full, text_dropped=text, image_dropped=image,
        samples=c.samples[rows],
    )  # fmt: skip
