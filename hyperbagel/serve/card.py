"""What clients are told of the model: its students and drafters, what they were made for, the usual settings and sizes."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

from PIL import Image

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.pipeline import HyperBagel, ImageRequest
from hyperbagel.serve.schemas import Limits


def model_card(model: HyperBagel, name: str, created: int, limits: Limits) -> dict[str, Any]:
    """OpenAI's model object, and ours beside it. Sizes are pixels, [width, height]."""
    options, stride = model.parts.model.config.options, model.parts.model.config.latent_stride
    samplers = _samplers(model)
    # how long an answer may be at most: the context holds the question too
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
        "size": {"usual": [*reversed(model.default_size)], "stride": stride, "largest": options.max_latent_size * stride},
        "limits": {"n": limits.n, "steps": limits.steps, "images": limits.images, "max_tokens": tokens, "body_bytes": limits.body_bytes},
    }


def _samplers(model: HyperBagel) -> dict[str, dict[str, Any]]:
    """How the students are sampled that can be read: one damaged folder must not take the others away."""
    found = {}
    for name in model.students.names():
        try:
            found[name] = asdict(model.students.sampler(name))
        except InputError as error:
            warnings.warn(f"{error}; going on without student {name}", Notice, stacklevel=2)
    return found


def _usual(model: HyperBagel, *images: Image.Image) -> dict[str, Any]:
    """What holds where a request says nothing, by the names that requests use."""
    settings = asdict(model.settings(ImageRequest("x", images), warn=False))
    del settings["student"]
    return settings | {"steps": settings.pop("num_steps")}
