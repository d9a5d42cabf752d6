"""The toybox evaluation: pictures, edits and answers of one model, scored as they come and recorded item by item.

A run that was stopped can be resumed: items whose record is in the output folder are not made again. Every item's noise is a function of
its id, so that two models get the same prompts and the same noise (for paired differences).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import make_folder
from hyperbagel.evaluate import edits, questions, t2i
from hyperbagel.evaluate.calibration import detector_table, read_all
from hyperbagel.evaluate.diversity import DRAWS, pixel_diversity, scene_diversity
from hyperbagel.evaluate.records import Record, Worker, digest, run_items
from hyperbagel.evaluate.report import print_report, write_report
from hyperbagel.evaluate.summary import summarise_diversity, summarise_edits, summarise_questions, summarise_t2i
from hyperbagel.generate.types import AskRequest, Denoising, ImageRequest, ImageResult, TextResult
from hyperbagel.model.student import fingerprint
from hyperbagel.model.weights import load_tensors
from hyperbagel.toybox.detector import Detector
from hyperbagel.toybox.items import edit_eval_items, question_eval_items, t2i_eval_prompts
from hyperbagel.toybox.render import render
from hyperbagel.toybox.rerender import rerender
from hyperbagel.toybox.scene import Scene

DETECTOR = Path(__file__).parents[1] / "assets" / "toybox" / "detector.safetensors"


class Model(Protocol):
    """What the evaluation needs of a model; hyperbagel.pipeline.HyperBagel is one."""

    parts: Any  # `parts.model` has the weights

    def generate_batch(self, requests: list[ImageRequest]) -> list[ImageResult]: ...

    def ask_batch(self, requests: list[AskRequest]) -> list[TextResult]: ...

    def settings(self, request: ImageRequest) -> Denoising:
        """The request's settings, with this model's defaults where it has none."""
        ...


@dataclass(frozen=True)
class Settings:
    """How the model is asked. Stored with the records, so that records made with other settings are not mixed in.

    image, edit, answer: options of ImageRequest (for prompts and for edits) and of AskRequest; absent ones keep the request's default.
    """

    split: str = "train"
    seed: int = 0
    side: int = 64
    think: bool = False
    image: dict[str, Any] = field(default_factory=dict)
    edit: dict[str, Any] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=lambda: {"max_tokens": 192})


def resolve(settings: Settings, fill: Callable[[ImageRequest], Denoising] = ImageRequest.denoising) -> dict[str, Any]:
    """The settings with all defaults of the requests filled in, as plain JSON values: what a figure depends on besides the model."""
    edit = fill(ImageRequest(images=(Image.new("RGB", (16, 16)),), **settings.edit))
    full = asdict(settings) | {"image": asdict(fill(ImageRequest(**settings.image))), "edit": asdict(edit)}
    for part, asked in (("image", settings.image), ("edit", settings.edit)):
        if asked.get("think_temperature"):  # no setting of denoising
            full[part]["think_temperature"] = asked["think_temperature"]
    return json.loads(json.dumps(full))


def weights_of(model: Any, *students: str | None) -> dict[str, Any]:
    """For the header of records: what identifies the weights of a model and of these students of it, and the numbers it computes with."""
    digests = {name: digest(model.students.find(name)) for name in students if name not in (None, "none")}
    return {"base": fingerprint(model.parts.model), "students": digests} | numbers_of(model)


def planner_of(model: Any) -> dict[str, str]:
    """For the header of records in think mode: what identifies the weights of a model's planner, if it has one."""
    folder = model.planner.folder
    return {"planner": digest(folder)} if folder is not None and folder.is_dir() else {}


def autoencoder_of(model: Any) -> str:
    """What identifies the weights of a model's autoencoder, which `weights_of` leaves out."""
    return fingerprint(model.parts.vae)


def numbers_of(model: Any) -> dict[str, str]:
    """The dtype of a model's numbers and the type of its device, neither of which the fingerprint of its weights tells apart."""
    parameters, codes = list(model.parts.model.parameters()), getattr(model.parts.model, "codes", None)
    dtypes = {str(p.dtype).removeprefix("torch.") if p.is_floating_point() else codes for p in parameters}
    kinds = {"dtype": dtypes, "device": {p.device.type for p in parameters}}
    return {name: "+".join(sorted(found)) for name, found in kinds.items()}


def load_detector(path: Path = DETECTOR) -> Detector:
    """The shipped detector, or one in another file. Raises InputError if the file is missing or holds another network."""
    return Detector.from_state(load_tensors(path))


def run_toybox_eval(
    model: Model,
    *,
    n_t2i: int = 2400,
    n_edits: int = 1200,
    n_questions: int = 3000,
    n_diversity: int | None = None,
    batch: int = 16,
    settings: Settings | None = None,
    out: Path | str | None = None,
    split: str = "train",
    detector: Detector | None = None,
    calibrate: int = 600,
    show: bool = True,
) -> dict[str, Any]:
    """Score `model` on the three tasks; a count of 0 leaves a task out. Returns what report.json holds.

    n_diversity: prompts that are drawn four times to see how much the pictures differ; None: a fortieth of `n_t2i`.
    out: folder for t2i.jsonl, diversity.jsonl, edits.jsonl, questions.jsonl and report.json; None keeps nothing. split: used if no
    `settings` are given. calibrate: scenes in the detector's own table. show: print the tables. Raises InputError if `out` has records
    made with other settings or other weights.
    """
    chosen = settings or Settings(split=split)
    detector = detector or load_detector()
    out = None if out is None else make_folder(out)

    resolved = resolve(chosen, model.settings)
    weights = {} if out is None else weights_of(model, chosen.image.get("student"), chosen.edit.get("student"))
    weights |= planner_of(model) if chosen.think and out is not None else {}

    def run(part: str, items: Sequence[Any], worker: Worker) -> list[Record]:
        header = {"settings": resolved, "n": len(items)} | weights
        return run_items(part, items, worker, seed=chosen.seed, batch=batch, header=header, path=out and out / f"{part}.jsonl")

    result: dict[str, Any] = {"settings": resolved}
    t2i_items = t2i_eval_prompts(n_t2i, chosen.seed, chosen.split) if n_t2i else []
    if n_t2i:
        result["t2i"] = summarise_t2i(run("t2i", t2i_items, t2i_worker(model, detector, chosen)))
    n_diversity = n_t2i // 40 if n_diversity is None else n_diversity
    if n_diversity:
        open_items = t2i_eval_prompts(n_diversity, chosen.seed + 1, chosen.split)
        result["diversity"] = summarise_diversity(run("diversity", open_items, diversity_worker(model, detector, chosen)))
    if n_edits:
        items = edit_eval_items(n_edits, chosen.seed, chosen.split)
        result["edits"] = summarise_edits(run("edits", items, edit_worker(model, detector, chosen)))
    if n_questions:
        asked = question_eval_items(n_questions, chosen.seed, chosen.split)
        result["questions"] = summarise_questions(run("questions", asked, _question_worker(model, chosen)))
    result["detector"] = detector_table(detector, t2i_items[:calibrate], n=calibrate, side=chosen.side)
    if out is not None:
        result = write_report(result, out / "report.json")
    if show:
        print_report(result)
    return result


def t2i_worker(model: Model, detector: Detector, s: Settings) -> Worker:
    """Draws prompts and scores them."""

    def work(items: list[Any], seeds: list[int]) -> list[Record]:
        asked: dict[str, Any] = {"size": (s.side, s.side), "think": s.think} | s.image
        results = model.generate_batch([ImageRequest(prompt=i.prompt, seed=seed, **asked) for i, seed in zip(items, seeds)])
        pictures = np.stack([as_square(r.image, s.side) for r in results])
        records = []
        for item, result, picture, reading in zip(items, results, pictures, read_all(detector, pictures), strict=True):
            score = asdict(t2i.score_t2i(item, picture, reading))
            records.append({"category": item.category, "prompt": item.prompt, "heldout": item.heldout, **score, "nfe": result.nfe})
        return records

    return work


def diversity_worker(model: Model, detector: Detector, s: Settings) -> Worker:
    """Draws each prompt several times and measures how much the pictures differ."""

    def work(items: list[Any], seeds: list[int]) -> list[Record]:
        asked: dict[str, Any] = {"size": (s.side, s.side), "think": s.think} | s.image
        records = []
        for item, seed in zip(items, seeds):
            results = model.generate_batch([ImageRequest(prompt=item.prompt, seed=seed + k, **asked) for k in range(DRAWS)])
            pictures = np.stack([as_square(r.image, s.side) for r in results])
            scenes = [rerender(p, r).scene for p, r in zip(pictures, read_all(detector, pictures), strict=True)]
            differ = {"scene": scene_diversity(scenes), "pixel": pixel_diversity(pictures)}
            records.append({"category": item.category, "prompt": item.prompt} | differ)
        return records

    return work


def edit_worker(model: Model, detector: Detector, s: Settings) -> Worker:
    """Edits drawings and scores the results."""

    def work(items: list[Any], seeds: list[int]) -> list[Record]:
        asked: dict[str, Any] = {"size": (s.side, s.side), "think": s.think} | s.edit
        sources = [(drawn(item.source, s.side),) for item in items]
        results = model.generate_batch(
            [ImageRequest(prompt=i.instruction, images=images, seed=seed, **asked) for i, images, seed in zip(items, sources, seeds)]
        )
        pictures = np.stack([as_square(r.image, s.side) for r in results])
        records = []
        for item, result, picture, reading in zip(items, results, pictures, read_all(detector, pictures), strict=True):
            score = edits.score_edit(item, picture, reading)
            row = {"group": item.group, "prompt": item.instruction, "heldout": item.heldout, "nfe": result.nfe}
            records.append(row | asdict(score) | {"o": score.o})
        return records

    return work


def _question_worker(model: Model, s: Settings) -> Worker:
    def work(items: list[Any], seeds: list[int]) -> list[Record]:
        asked: dict[str, Any] = {"temperature": 0.0, "think": s.think} | s.answer
        pictures = [(drawn(item.scene, s.side),) for item in items]
        results = model.ask_batch(
            [AskRequest(question=i.question, images=images, seed=seed, **asked) for i, images, seed in zip(items, pictures, seeds)]
        )
        records = []
        for item, result in zip(items, results, strict=True):
            score = asdict(questions.score_question(item, result.text))
            row = {"kind": item.kind, "pair": item.pair, "question": item.question, "answer": result.text, "truth": item.answer}
            records.append(row | {"heldout": item.heldout, "tokens": result.tokens} | score)
        return records

    return work


def drawn(scene: Scene, side: int) -> Image.Image:
    """A scene's drawing, as models are given it."""
    return Image.fromarray(render(scene, side))


def as_square(image: Image.Image, side: int) -> np.ndarray:
    """uint8 [side, side, 3]; a picture of another size is resampled. Raises InputError if it is not square."""
    if image.width != image.height:
        raise InputError(f"got a picture {image.width}x{image.height}, expected a square one; ask the model for a square size")
    image = image.convert("RGB")
    return np.asarray(image if image.width == side else image.resize((side, side), Image.Resampling.BOX))
