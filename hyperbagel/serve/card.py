"""What GET /v1/models says about the model: its students and drafters, what they were made for, its usual settings and sizes."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

from PIL import Image

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.pipeline import HyperBagel, ImageRequest
from hyperbagel.serve.schemas import Limits


def model_card(model: HyperBagel, name: str, created: int, limits: Limits) -> dict[str, Any]:
    """OpenAI's model object with fields of our own. created: Unix time. Sizes are [width, height] in pixels."""
    options, stride = model.parts.model.config.options, model.parts.model.config.latent_stride
    samplers = samplers_of(model)
    # an upper bound: the question takes a part of the context
    tokens = min(limits.max_tokens, model.parts.model.config.llm.max_position_embeddings)
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "hyperbagel",
        "students": list(samplers),
        "drafters": model.drafters.names(),
        "samplers": samplers,
        "usual": {"draw": _usual(model), "edit": _usual(model, Image.new("RGB", (1, 1)))},
        "plans": {"draw": True, "edit": options.planned_edits},
        "size": {"usual": [*reversed(model.default_size)], "stride": stride, "largest": options.max_latent_size * stride},
        "limits": {"n": limits.n, "steps": limits.steps, "images": limits.images, "max_tokens": tokens, "body_bytes": limits.body_bytes},
    }


def samplers_of(model: HyperBagel) -> dict[str, dict[str, Any]]:
    """Each student's sampler settings. A student whose folder is damaged is left out with a Notice, so that the others stay usable."""
    found = {}
    for name in model.students.names():
        try:
            found[name] = asdict(model.students.sampler(name))
        except InputError as error:
            warnings.warn(f"{error}; going on without student {name}", Notice, stacklevel=2)
    return found


def _usual(model: HyperBagel, *images: Image.Image) -> dict[str, Any]:
    """The settings of a request that gives none, by the names that requests use. images: what it edits."""
    settings = asdict(model.settings(ImageRequest("x", images), warn=False))
    del settings["student"]
    return settings | {"steps": settings.pop("num_steps")}
