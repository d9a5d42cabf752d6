"""A student merged into its model's own tensors, so that code that knows nothing of students can run it.

A student adds two things to the model: changed layers, and a vector for the guidance scales (Hyper-Bagel 3.2.1). At fixed scales that
vector is a constant, added where the timestep's embedding is added, so it folds into the last bias of the timestep's embedder.

Shape legend: E hidden size, r rank, I / O input and output size of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hyperbagel.core.errors import InputError
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.student import Sampler, Student
from hyperbagel.nn.lora import Adapter, factorise
from hyperbagel.nn.quantized import matrix_of

FOLD = "time_embedder.mlp.2.bias"
_HEAD = FOLD.rpartition(".")[0]  # its layer, which is always replaced


def check_scales(sampler: Sampler, text_scale: float, image_scale: float) -> None:
    """Raises InputError for scales that the student was not made for: folded in, they cannot be changed back."""
    for name, value, (low, high) in (
        ("text scale", text_scale, sampler.text_range),
        ("image scale", image_scale, sampler.image_range),
    ):
        if not low <= value <= high:
            raise InputError(f"got {name} {value:g}, expected {low:g} to {high:g}, which this student was made for; choose one of those")


def folded_sampler(sampler: Sampler, text_scale: float, image_scale: float) -> Sampler:
    """How the merged weights are sampled: with the student's steps and shift, and no guidance beyond what is folded in."""
    return replace(
        sampler,
        text_scale=1.0,
        image_scale=1.0,
        edit_text_scale=1.0,
        edit_image_scale=1.0,
        text_range=(1.0, 1.0),
        image_range=(1.0, 1.0),
        stage=f"{sampler.stage}, guidance {text_scale:g} / {image_scale:g} folded in".lstrip(", "),
    )


@torch.no_grad()
def guidance_vector(student: Student, text_scale: float, image_scale: float) -> Tensor:
    """What the embedders add to every latent token at these scales, [E], fp32."""
    some = next(student.guidance.parameters())
    scales = (torch.tensor([scale], device=some.device) for scale in (text_scale, image_scale))
    return student.guidance(*scales).flatten().float()


def changed_tensors(base: Bagel, student: Student, text_scale: float, image_scale: float) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors that the student replaces, under the base's own names, in fp32 on the base's device."""
    yield from _replaced(base, student, text_scale, image_scale)
    for name in student.adapter.low_rank:
        linear = base.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        yield f"{name}.weight", matrix_of(linear).detach().float() + student.adapter.change(name)


def _replaced(base: Bagel, student: Student, text_scale: float, image_scale: float) -> Iterator[tuple[str, Tensor]]:
    """Of `changed_tensors` those that are no low-rank change."""
    adapter = student.adapter
    folded = base.get_parameter(FOLD)
    for name in adapter.copies:
        for leaf, value in adapter.get_submodule(name).state_dict().items():
            if f"{name}.{leaf}" == FOLD:
                folded = value
            else:
                yield f"{name}.{leaf}", value.detach().float()
    yield FOLD, folded.detach().float() + guidance_vector(student, text_scale, image_scale).to(folded.device)


def merged_tensors(
    base: Bagel, student: Student, text_scale: float, image_scale: float, stored_as: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """All tensors of the merged model. `stored_as(name, tensor)` casts each as soon as it is made: a 7B's change in fp32 is 26 GB."""
    tensors = {name: stored_as(name, x) for name, x in base.state_dict().items()}
    for name, x in changed_tensors(base, student, text_scale, image_scale):
        tensors[name] = stored_as(name, x)
    return tensors


@dataclass(frozen=True)
class LowRankStudent:
    """A student as a LoRA and replaced layers.

    `tensors`: under each LoRA layer's name lora_A.weight [r, I], lora_B.weight [O, r] and, if `biases`, lora_B.bias [O]; the replaced
    layers' tensors under their own names.
    """

    rank: int
    alpha: float
    layers: tuple[str, ...]  # modules with a LoRA
    whole: tuple[str, ...]  # modules that are replaced
    biases: bool  # every layer with a LoRA has lora_B.bias
    tensors: dict[str, Tensor]
    error: float  # |change - what the LoRA gives| / |change|, over all layers with a LoRA
    worst: tuple[str, float]  # the layer with the largest such error, and that error


@torch.no_grad()
def as_low_rank(base: Bagel, student: Student, text_scale: float, image_scale: float, rank: int | None = None) -> LowRankStudent:
    """A student as a LoRA with the guidance folded in. A LoRA student keeps its own factors, so nothing is lost; one of whole layers is
    factorised at `rank`. Raises InputError for a rank given to the former, or none to the latter."""
    adapter = student.adapter
    if adapter.low_rank:
        if rank not in (None, adapter.rank):
            raise InputError(f"got rank {rank} for a student that is a LoRA of rank {adapter.rank} already; leave the rank out")
        # its own factors are written: as matrices the changes of a 7B would be 26 GB
        return _own_factors(base, adapter, dict(_replaced(base, student, text_scale, image_scale)))
    if rank is None:
        raise InputError("got a student of whole layers, expected a rank to factorise it at; give --rank, for instance 64")
    return _factorised(base, adapter, dict(changed_tensors(base, student, text_scale, image_scale)), rank)


def _own_factors(base: Bagel, adapter: Adapter, changed: dict[str, Tensor]) -> LowRankStudent:
    """`as_low_rank` of a LoRA student."""
    whole = tuple(dict.fromkeys((*adapter.copies, _HEAD)))
    tensors = {n: v for n, v in adapter.state_dict().items() if n.endswith(("lora_A.weight", "lora_B.weight"))}
    tensors |= _whole(base, changed, whole)
    return LowRankStudent(adapter.rank, adapter.alpha, adapter.low_rank, whole, False, tensors, 0.0, ("", 0.0))


def _factorised(base: Bagel, adapter: Adapter, changed: dict[str, Tensor], rank: int) -> LowRankStudent:
    """`as_low_rank` of a student of whole layers: its matrices are factorised, its norms and heads stay whole."""
    layers = tuple(n for n in adapter.copies if "_moe_gen" in n and isinstance(base.get_submodule(n), nn.Linear))
    whole = tuple(dict.fromkeys((*(n for n in adapter.copies if n not in layers), _HEAD)))
    tensors, missed, full, errors, moved = _whole(base, changed, whole), 0.0, 0.0, {}, {}
    for name in layers:
        linear = base.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        factors = factorise(changed[f"{name}.weight"] - matrix_of(linear).float(), rank)
        tensors |= {f"{name}.lora_A.weight": factors.a, f"{name}.lora_B.weight": factors.b}
        missed, full = missed + factors.missed, full + factors.whole
        errors[name] = (factors.missed / factors.whole) ** 0.5 if factors.whole else 0.0
        bias = torch.zeros(linear.out_features, device=linear.weight.device)
        moved[f"{name}.lora_B.bias"] = bias if linear.bias is None else changed[f"{name}.bias"] - linear.bias.float()
    biases = any(bool(bias.any()) for bias in moved.values())
    worst = max(errors, key=lambda name: errors[name])
    tensors |= moved if biases else {}
    error = (missed / full) ** 0.5 if full else 0.0
    return LowRankStudent(rank, float(rank), layers, whole, biases, tensors, error, (worst, errors[worst]))


def _whole(base: Bagel, changed: dict[str, Tensor], modules: tuple[str, ...]) -> dict[str, Tensor]:
    """Every tensor of these modules as the student has it, fp32, by the base's names."""
    state = {f"{name}.{leaf}": value for name in modules for leaf, value in base.get_submodule(name).state_dict().items()}
    return {name: changed.get(name, value.float()) for name, value in state.items()}
