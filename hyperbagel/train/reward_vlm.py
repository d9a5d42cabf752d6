"""A reward model of HPSv3's kind (Ma et al. 2025) from a local folder: Qwen2-VL reads picture and prompt, and from the hidden state of one
token a small head tells how much people would like the picture. Differentiable with respect to the picture.

The folder holds Qwen2-VL as transformers reads it (config.json, the tokenizer with its chat template, and safetensors that also hold the
head's tensors, as `rm_head.*`) and reward.json, which says how the model is asked:

    template    the text after the picture; {prompt} stands for the prompt, and `token` must occur once
    token       whose hidden state the head reads (default "<|Reward|>")
    output      which of the head's outputs is the reward (default 0: HPSv3's mean; its second one is the spread)
    pixels      area that pictures are resized to (default 256 * 28 * 28, as in HPSv3)

Shape legend: B pictures, n patches of one (four merge into a token), E hidden size.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hyperbagel.core.config import Config, check_config
from hyperbagel.core.errors import InputError
from hyperbagel.core.files import one_line, read_json
from hyperbagel.model.weights import TensorFolder

# per channel; those that OpenAI's CLIP was trained with, and Qwen2-VL too
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD = "rm_head."


class Asking(Config):
    """reward.json."""

    template: str
    token: str = "<|Reward|>"
    output: int = Field(default=0, ge=0)
    pixels: int = Field(default=256 * 28 * 28, gt=0)


class VlmReward:
    """(pictures [B, 3, H, W] in [-1, 1], B prompts) -> [B]."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """dtype: the backbone's; None: bfloat16 on a GPU, else float32. The head is fp32. Raises InputError without transformers, or for a
        folder that holds no such model."""
        try:
            transformers: Any = importlib.import_module("transformers")
        except ImportError as error:
            raise InputError("reward_kind=vlm: got no transformers, expected it installed; pip install 'hyperbagel[rewards]'") from error
        self.asking = check_config(Asking, read_json(folder / "reward.json", "write it as docs/training/refl.md says"), "reward.json")
        if self.asking.template.count(self.asking.token) != 1 or "{prompt}" not in self.asking.template:
            raise InputError(f"{folder}/reward.json: got a template without {{prompt}}, or not with one {self.asking.token}; correct it")
        kind = read_json(folder / "config.json").get("model_type")
        if kind != "qwen2_vl":  # if it were missing, transformers would make up a model of 7B
            raise InputError(
                f"{folder}/config.json: got model_type {kind!r}, expected 'qwen2_vl'; other reward models come by reward_entry"
            )
        self.device = device
        stored = TensorFolder(folder, "model")
        tensors = {name.removeprefix(HEAD): stored.tensor(name) for name in stored.shapes if name.startswith(HEAD)}
        rows = [shape[0] for name, shape in stored.shapes.items() if name.endswith("embed_tokens.weight")]
        if not tensors or len(rows) != 1:
            raise InputError(f"{folder}: got no tensors {HEAD}* or no embedding, expected a whole reward model, check the folder")
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            config = transformers.Qwen2VLConfig.from_pretrained(folder, local_files_only=True)
            config.text_config.vocab_size = rows[0]  # HPSv3 has one token more than the model it was made from
            numbers = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
            model, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
                folder, config=config, dtype=numbers, local_files_only=True, output_loading_info=True
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the library raises a different error for each kind of damage
            raise InputError(f"{folder}: got no Qwen2-VL that transformers can read ({one_line(error)}), restore the folder") from error
        if missing := sorted({*info["missing_keys"]} - {"lm_head.weight"}):
            raise InputError(
                f"{folder}: got no tensor {missing[0]!r} ({len(missing)} missing), expected a whole Qwen2-VL, restore the file"
            )
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise InputError(f"{folder}: got a tokenizer without a chat template, expected Qwen2-VL's, copy chat_template.jinja there")
        self.tokenizer.add_tokens([self.asking.token], special_tokens=True)
        self.mark: int = self.tokenizer.convert_tokens_to_ids(self.asking.token)
        if self.mark >= config.text_config.vocab_size:
            known = config.text_config.vocab_size
            raise InputError(
                f"{folder}: got id {self.mark} for {self.asking.token!r}, expected below {known}, copy the reward's own tokenizer"
            )
        self.special = sorted({str(token) for token in self.tokenizer.added_tokens_decoder.values()} | {self.asking.token})
        self.core = model.model.to(device).eval().requires_grad_(False)
        self.head = make_head(tensors, folder).to(device).eval().requires_grad_(False)
        vision = config.vision_config
        self.patch, self.merge, self.frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self.picture: int = config.image_token_id

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Gradients pass to the pixels."""
        patches, grid = self.patches(pixels)
        tokens = math.prod(grid) // self.merge**2  # of one picture
        rows = [self.ids(prompt, tokens) for prompt in prompts]
        longest = max(map(len, rows))
        # padded at the end, where attention is masked
        ids = torch.tensor([row + [self.mark] * (longest - len(row)) for row in rows], device=self.device)
        seen = torch.arange(longest, device=self.device) < torch.tensor([len(row) for row in rows], device=self.device)[:, None]
        where = torch.tensor([[1, *grid]] * len(rows), device=self.device)
        found = self.core.get_image_features(patches.flatten(0, 1), where)
        pictures = torch.cat(list(getattr(found, "pooler_output", found)))  # [B n / 4, E]
        x = self.core.get_input_embeddings()(ids)
        x = x.masked_scatter((ids == self.picture)[..., None].expand_as(x), pictures.to(x.dtype))
        # no position_ids: HPSv3 counts positions one by one, through pictures too
        hidden = self.core.language_model(inputs_embeds=x, attention_mask=seen.long(), use_cache=False).last_hidden_state
        at = torch.tensor([row.index(self.mark) for row in rows], device=self.device)
        with torch.autocast(self.device.type, enabled=False):  # near 6, bf16 has steps of 1/32
            return self.head(hidden[torch.arange(len(rows), device=self.device), at].float())[:, self.asking.output]

    def ids(self, prompt: str, tokens: int) -> list[int]:
        """What the model reads for one picture of `tokens` tokens and its prompt."""
        for special in self.special:  # a prompt must not bring special tokens
            prompt = prompt.replace(special, "")
        words = self.asking.template.replace("{prompt}", prompt)
        content = [{"type": "image"}, {"type": "text", "text": words}]
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        pad = self.tokenizer.convert_ids_to_tokens(self.picture)
        return list(self.tokenizer(text.replace(pad, pad * tokens, 1))["input_ids"])

    def patches(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pictures [B, 3, H, W] in [-1, 1] as Qwen2-VL's patches [B, n, 3 * frames * patch * patch], and (rows, columns) of patches."""
        height, width = resized(pixels.shape[2], pixels.shape[3], self.patch * self.merge, self.asking.pixels)
        x = pixels.float().clamp(-1, 1) / 2 + 0.5
        if (height, width) != tuple(x.shape[2:]):
            x = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (MEAN, STD))
        x = (x - mean) / std
        b, c, m, p = len(x), x.shape[1], self.merge, self.patch
        h, w = height // p, width // p
        x = x.reshape(b, c, h // m, m, p, w // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)  # the four patches of a token are neighbours
        x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, self.frames, -1, -1)  # a still picture is a video of equal frames
        return x.reshape(b, h * w, c * self.frames * p * p), (h, w)


def resized(height: int, width: int, unit: int, pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of `unit`, of nearly the same shape: shrunk to at most, or enlarged to at least, `pixels` pixels."""
    h, w = (max(unit, round(side / unit) * unit) for side in (height, width))
    scale = math.sqrt(height * width / pixels)
    if h * w > pixels:
        h, w = (max(unit, math.floor(side / scale / unit) * unit) for side in (height, width))
    elif h * w < pixels:
        h, w = (math.ceil(side / scale / unit) * unit for side in (height, width))
    return h, w


def make_head(tensors: dict[str, Tensor], folder: Path) -> nn.Module:
    """Linear layers with ReLU between them, in the order of their numbers (`0.weight`, `3.weight`, ...; without dropout); a single layer
    has no number. Raises InputError if a weight is missing."""
    numbers = sorted({int(name.split(".")[0]) for name in tensors if name[0].isdigit()})
    names = [f"{i}." for i in numbers] or [""]
    layers: list[nn.Module] = []
    for name in names:
        weight, bias = tensors.get(f"{name}weight"), tensors.get(f"{name}bias")
        if weight is None or weight.ndim != 2:
            raise InputError(f"{folder}: got no matrix {HEAD}{name}weight, expected the head of a reward, restore the file")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.load_state_dict({"weight": weight.float()} | ({} if bias is None else {"bias": bias.float()}))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def open_vlm(folder: Path | None, device: torch.device) -> VlmReward:
    """The reward model in `folder`. Raises InputError without a folder, or for one that cannot be used."""
    if folder is None or not folder.is_dir():
        got = "no folder" if folder is None else f"{folder}, which is no folder"
        raise InputError(f"reward: got {got}, expected that of a reward model (HPSv3), set reward=FOLDER")
    return VlmReward(folder, device)
