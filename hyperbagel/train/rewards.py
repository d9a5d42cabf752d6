"""Rewards on pictures: a head over the base's frozen understanding branch, or a model of the user's own.

Shape legend: B samples, E hidden size.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor, nn

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_path, atomic_write_text, make_folder
from hyperbagel.data.packing import PackedBatch, PackSpec, pack
from hyperbagel.data.plan import Sample, Text, VaeImage, VitImage
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.student import fingerprint
from hyperbagel.model.weights import load_tensors, save_tensors
from hyperbagel.nn.masks import dense_mask
from hyperbagel.train.contexts import some, split_sample
from hyperbagel.train.discriminator import vit_input
from hyperbagel.train.losses.refl import refl_loss
from hyperbagel.train.reward_vlm import open_vlm

log = logging.getLogger(__name__)

# (pictures [B, 3, H, W] in [-1, 1], the samples they were drawn for) -> [B]; differentiable with respect to the pictures
Reward = Callable[[Tensor, Sequence[Sample]], Tensor]


class RewardSettings(BaseModel):
    """Recipe keys of the stages that use a reward: which one, and how many pictures it sees."""

    reward: Path | None = None  # folder of stage reward or of a reward model (vlm), or what `reward_entry` reads
    # answers (ours): the base is asked about the picture, no folder needed; vlm: HPSv3 and similar models (train.reward_vlm)
    reward_kind: Literal["preferences", "answers", "vlm"] = "preferences"
    question: str | None = None  # answers: what is asked about samples without questions of their own; {prompt} stands for their prompt
    answer: str = "Yes"  # the right answer to `question`
    reward_entry: str | None = None  # "module:function" of a reward model of your own
    ceiling: float = 6.0  # 3.2.5, for HPSv3; set it to what your reward gives its best pictures
    reward_samples: int = Field(default=0, ge=0)  # pictures per batch that are decoded and rewarded; 0: all
    reward_cap: float = Field(default=0.3, gt=0)  # ours: cap on the reward's gradient, relative to the one that holds the student


HERE = VitImage(np.zeros((0, 0, 3), np.uint8))  # the drawn picture's place in a plan


class RewardHead(nn.Module):
    """[B, 2 E] -> [B]: a reward from the hidden state of the prompt's last token and the mean over the prompt's tokens."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * size)
        self.inner, self.out = nn.Linear(2 * size, size), nn.Linear(size, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # bf16 would leave a reward two or three digits
            return self.out(F.silu(self.inner(self.norm(x.float())))).squeeze(-1)


def understand(base: Bagel, spec: PackSpec, pixels: Tensor, samples: Sequence[Sample]) -> Tensor:
    """What the understanding branch makes of [input pictures | the picture | the prompt]: [B, 2 E], as RewardHead takes it. Gradients pass
    to the pixels."""
    plans: list[Sample] = []
    for sample in samples:
        before, _, prompt = split_sample(sample)
        plans.append([*(item for item in before if isinstance(item, VitImage)), HERE, before[prompt]])
    batch = pack_with(base, spec, pixels, plans)
    hidden = base.backbone(base.embed_packed(batch), batch.positions, mask=dense_mask(batch)).u
    assert hidden is not None
    found = []
    for row, plan in enumerate(plans):
        text = plan[-1]
        assert isinstance(text, Text)
        n = len(text.ids) + 2
        end = int((batch.sample_id[row] >= 0).sum())  # rows are padded behind their last token, the prompt's
        found.append(torch.cat([hidden[row, end - 1], hidden[row, end - n : end].mean(0)]))
    return torch.stack(found)


def pack_with(base: Bagel, spec: PackSpec, pixels: Tensor, plans: Sequence[Sample]) -> PackedBatch:
    """A batch of plans, one per row, in which HERE stands for the plan's drawn picture, of pixels [B, 3, H, W]. Gradients pass to them."""
    patches, _, (h, w) = vit_input(base, pixels)
    side = spec.vit_patch
    blank = VitImage(np.zeros((h * side, w * side, 3), np.uint8))  # a placeholder of the same size
    plans = [[blank if item is HERE else item for item in plan] for plan in plans]
    unused = torch.Generator().manual_seed(0)  # pack draws noise for latents, and there are none here
    batch = pack(plans, spec, encode=_no_latents, generator=unused, device=base.device)
    own = [item is blank for plan in plans for item in plan if isinstance(item, VitImage)]
    place = torch.tensor(own, device=base.device).repeat_interleave(torch.tensor(batch.vit_lens, device=base.device)).nonzero().flatten()
    batch.vit_patches = batch.vit_patches.index_copy(0, place, patches.to(batch.vit_patches.dtype))
    return batch


def _no_latents(pixels: Tensor) -> Tensor:
    raise AssertionError("a reward reads pictures through the ViT alone")


class UnderstandingReward:
    """r = head(understanding branch): a head trained on preference pairs (stage "reward") over the frozen base."""

    def __init__(self, base: Bagel, spec: PackSpec, head: RewardHead) -> None:
        self.base, self.spec, self.head = base, spec, head

    def __call__(self, pixels: Tensor, samples: Sequence[Sample]) -> Tensor:
        return self.head(understand(self.base, self.spec, pixels, samples))


class AnswerReward:
    """r = mean log-probability of the right answers when the base is asked about the picture; at most 0. Nothing is trained.

    ours (after VQAScore, Lin et al. 2024, and TIFA, Hu et al. 2023). Questions and answers may follow a sample's picture, as pairs of
    texts. All share one reading of the picture, and no pair sees another, since one answer could give away the next. About any other
    sample, `question` is asked with its {prompt} filled in, after its input pictures and the drawn one; the right answer is `answer`.
    """

    def __init__(self, base: Bagel, spec: PackSpec, tokenizer: Tokenizer, question: str | None = None, answer: str = "Yes") -> None:
        self.base, self.spec, self.tokenizer, self.question, self.answer = base, spec, tokenizer, question, answer

    def __call__(self, pixels: Tensor, samples: Sequence[Sample]) -> Tensor:
        """The reward [B], differentiable with respect to the pixels. Raises InputError for a sample without questions if there is no
        `question` for all."""
        plans = [self._plan(sample) for sample in samples]
        pictures = [sum(not isinstance(x, Text) for x in plan) for plan in plans]
        batch, together = apart(pack_with(self.base, self.spec, pixels, plans), pictures)
        ce = self.base.forward_train(batch, mask=dense_mask(batch) & together).ce  # [sum of answers' tokens and their ends]
        answers = [[len(x.ids) + 1 for x in plan if isinstance(x, Text) and x.loss] for plan in plans]
        of = torch.arange(len(plans), device=ce.device).repeat_interleave(torch.tensor([sum(n) for n in answers], device=ce.device))
        questions = torch.tensor([len(n) for n in answers], device=ce.device)
        return ce.new_zeros(len(plans)).index_add(0, of, -ce) / questions

    def _plan(self, sample: Sample) -> Sample:
        """The pictures of one sample, then what is asked about the drawn one: question, answer, question, answer, ..."""
        if checks := checks_behind(sample):
            return [HERE, *(text for check in checks for text in check)]
        if self.question is None:
            raise InputError(
                "answers: got a sample without questions behind its picture, expected some; set checks of the source to how many, "
                "or (for a reward) question to one that fits all"
            )
        before, _, _ = split_sample(sample)
        question = self.question.replace("{prompt}", prompt_text(sample, self.tokenizer))
        texts = Text(self.tokenizer.encode(question)), Text(self.tokenizer.encode(self.answer), loss=True)
        return [*(item for item in before if isinstance(item, VitImage)), HERE, *texts]


def open_reward(settings: RewardSettings, base: Bagel, spec: PackSpec, tokenizer: Tokenizer) -> Reward:
    """The reward that a recipe names. Raises InputError if it names none, or one that cannot be used."""
    if settings.reward_entry:
        return foreign_reward(settings.reward_entry, settings.reward, base.device, tokenizer)
    if settings.reward_kind == "answers":
        if settings.question and "{prompt}" not in settings.question:
            log.warning("question: got %r without {prompt}, so every picture is asked the same, whatever it was to show", settings.question)
        return AnswerReward(base, spec, tokenizer, settings.question, settings.answer)
    if settings.reward_kind == "vlm":
        return of_prompts(open_vlm(settings.reward, base.device), tokenizer)
    if settings.reward is None:
        raise InputError("reward: got no folder, expected one of stage reward, set reward=RUN/export, reward_kind or reward_entry")
    return load_reward(settings.reward, base, spec)


def feedback(
    reward: Reward, settings: RewardSettings, decode: Callable[[Tensor], Tensor], x0: Tensor, samples: Sequence[Sample]
) -> tuple[Tensor, Tensor, Tensor]:
    """What a reward makes of latents x0 [B, N, C] (a leaf that requires gradient): the mean reward, `refl_loss`, and the gradient of that
    by x0 [B, N, C]."""
    rows = some(len(x0), settings.reward_samples)
    score = reward(decode(x0[rows]), samples[rows])
    loss = refl_loss(score, settings.ceiling)
    return score.detach().mean(), loss.detach(), torch.autograd.grad(loss, x0)[0]


def apart(batch: PackedBatch, pictures: Sequence[int]) -> tuple[PackedBatch, Tensor]:
    """Makes the successive turns of a row independent of each other, each as if it alone followed the row's pictures.

    pictures: how many splits each row begins with; a turn is two splits, a question and its answer. Returns the batch with positions that
    start again for each turn, and a mask [B, 1, S, S] to combine with the usual one, under which no turn sees another.
    """
    begin = torch.tensor(pictures, device=batch.split_id.device)[:, None]
    turn = (batch.split_id - begin).div(2, rounding_mode="floor").clamp_min(-1)  # [B, S]; -1: pictures, padding
    positions = batch.positions.clone()
    first = positions.where(turn == 0, positions.max() + 1).amin(1)
    for n in range(1, int(turn.max()) + 1):
        mine = turn == n
        start = positions.where(mine, positions.max() + 1).amin(1)
        positions -= mine * (start - first)[:, None]
    q, k = turn[:, None, :, None], turn[:, None, None, :]
    return replace(batch, positions=positions), (k < 0) | (q == k)


def checks_behind(sample: Sample) -> list[tuple[Text, Text]]:
    """(question, answer) pairs that follow the picture to draw."""
    last = max(i for i, item in enumerate(sample) if isinstance(item, VaeImage) and item.loss)
    texts = [item for item in sample[last + 1 :] if isinstance(item, Text)]
    return list(zip(texts[::2], texts[1::2], strict=True))


def save_reward(folder: Path, head: RewardHead, base: Bagel, figures: dict[str, float]) -> None:
    """Writes reward.safetensors and reward.json (fingerprint of the base, held-out figures), whole or not at all."""
    make_folder(folder.parent)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_tensors(temporary / "reward.safetensors", head.state_dict())
        atomic_write_text(temporary / "reward.json", json.dumps({"base": fingerprint(base), **figures}, indent=2) + "\n")


def load_reward(folder: Path, base: Bagel, spec: PackSpec) -> UnderstandingReward:
    """Reads what `save_reward` wrote, frozen. Raises InputError for another base or a damaged folder."""
    try:
        about = json.loads((folder / "reward.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: got no reward ({error}), expected reward.json and reward.safetensors, run stage reward") from error
    if about.get("base") != fingerprint(base):
        raise InputError(f"{folder}: got a reward over another base, expected one of the recipe's model, train it with stage reward")
    head, tensors = RewardHead(base.config.llm.hidden_size), load_tensors(folder / "reward.safetensors")
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in head.state_dict().items()}:
        raise InputError(f"{folder}/reward.safetensors: got other tensors than this model's head has, run stage reward again")
    head.load_state_dict(tensors)
    return UnderstandingReward(base, spec, head.to(base.device).requires_grad_(False))


def foreign_reward(entry: str, folder: Path | None, device: torch.device, tokenizer: Tokenizer) -> Reward:
    """A reward model of the user's own. `entry` is "module:function", which is called once as function(folder, device).

    The callable it returns gets pictures [B, 3, H, W] in [-1, 1] and B prompts and gives [B], differentiable with respect to the pictures.
    Raises InputError if it cannot be imported.
    """
    module, _, name = entry.partition(":")
    try:
        score = getattr(importlib.import_module(module), name)(folder, device)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"reward_entry: got {entry!r}, which cannot be used ({error}), expected module:function on the path") from error

    return of_prompts(score, tokenizer)


def of_prompts(score: Callable[[Tensor, list[str]], Tensor], tokenizer: Tokenizer) -> Reward:
    """A reward that reads prompts as texts."""
    return lambda pixels, samples: score(pixels, [prompt_text(sample, tokenizer) for sample in samples])


def prompt_text(sample: Sample, tokenizer: Tokenizer) -> str:
    """The prompt of the first picture to draw, in words."""
    return tokenizer.decode(list(prompt_of(sample).ids))


def prompt_of(sample: Sample) -> Text:
    """The text that asks for the first picture to draw, as token ids."""
    before, _, at = split_sample(sample)
    prompt = before[at]
    assert isinstance(prompt, Text)
    return prompt
