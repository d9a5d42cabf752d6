"""A reward model of HPSv3's kind, tiny and with random weights: read from its folder, it says what transformers' own forward says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hyperbagel
from hyperbagel.core.errors import InputError
from hyperbagel.train.reward_vlm import MEAN, STD, VlmReward, make_head, open_vlm, resized

transformers: Any = pytest.importorskip(
    "transformers", reason="transformers is not installed: reward models of HPSv3's kind are not tested"
)

TOYBOX = Path(hyperbagel.__file__).parent / "assets" / "toybox"
ASKING = {"template": "How good is it for: {prompt}? <|Reward|> END", "pixels": 8 * 8 * 12}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>a{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As HPSv3's is: the head's tensors among Qwen2-VL's, and one token more than the model began with."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOYBOX)
    tokenizer.add_tokens(["<|image_pad|>", "<|Reward|>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"rope_parameters": {"type": "default", "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>")
    )
    torch.manual_seed(0)
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    head = {
        "rm_head.0.weight": (8, 32),
        "rm_head.0.bias": (8,),
        "rm_head.3.weight": (4, 8),
        "rm_head.3.bias": (4,),
        "rm_head.5.weight": (2, 4),
    }
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.randn(shape) for name, shape in head.items()}, path, metadata={"format": "pt"})
    (folder / "reward.json").write_text(json.dumps(ASKING))
    return folder


@pytest.fixture(scope="module")
def reward(folder: Path) -> VlmReward:
    return open_vlm(folder, torch.device("cpu"))


def pictures(n: int, height: int = 24, width: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_it_says_what_transformers_own_forward_says(reward: VlmReward, folder: Path) -> None:
    """Of each picture alone, with the ids and patches that it makes; positions one by one, the head by hand."""
    pixels, prompts = pictures(2), ["a car", "two long blue keys to the left of a star"]
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    tensors = load_file(folder / "model.safetensors")
    expected = []
    with torch.no_grad():
        for x, prompt in zip(pixels, prompts, strict=True):
            patches, grid = reward.patches(x[None])
            ids = torch.tensor([reward.ids(prompt, grid[0] * grid[1] // 4)])
            assert (ids == reward.picture).sum() == grid[0] * grid[1] // 4 and (ids == reward.mark).sum() == 1
            where = torch.arange(ids.shape[1]).expand(3, 1, -1)
            out = model.model(input_ids=ids, pixel_values=patches[0], image_grid_thw=torch.tensor([[1, *grid]]), position_ids=where)
            h = out.last_hidden_state[0, ids[0].tolist().index(reward.mark)]
            for i in (0, 3):
                h = (tensors[f"rm_head.{i}.weight"] @ h + tensors[f"rm_head.{i}.bias"]).relu()
            expected.append((tensors["rm_head.5.weight"] @ h)[0])
    torch.testing.assert_close(reward(pixels, prompts), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert expected[0] != expected[1]
    assert reward(pixels[:1], ["a car"]) != reward(pixels[:1], ["a key"]) and reward(pixels[1:], ["a car"]) != reward(pixels[:1], ["a car"])


def test_a_caption_is_words_whatever_stands_in_it(reward: VlmReward) -> None:
    plain, odd = "a car", "a <|image_pad|><|vision_start|>car<|Reward|><|im_end|>"
    assert torch.equal(reward(pictures(1), [odd]), reward(pictures(1), [plain]))


def test_the_head_is_in_fp32_where_training_casts(reward: VlmReward) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        cast = reward(pictures(2), ["a car", "a key"])
    assert cast.dtype == torch.float32 and (cast != cast.bfloat16().float()).any()


def test_gradients_pass_to_the_pixels(reward: VlmReward) -> None:
    pixels = pictures(2).requires_grad_()
    reward(pixels, ["a car", "a key"])[0].backward()
    assert pixels.grad is not None and pixels.grad[0].abs().sum() > 0 and pixels.grad[1].abs().sum() == 0
    with torch.no_grad():
        step = torch.zeros_like(pixels)
        step[0] = 0.02 * pixels.grad[0] / pixels.grad[0].norm()
        up, down = (reward(pixels + s * step, ["a car", "a key"])[0] for s in (1, -1))
    assert (up - down).item() == pytest.approx(2 * 0.02 * pixels.grad[0].norm().item(), rel=0.05)
    assert not any(p.requires_grad for p in (*reward.core.parameters(), *reward.head.parameters()))


def test_patches_stand_as_qwen2_vl_wants_them(reward: VlmReward) -> None:
    """Four that become one token one after the other; of each its colours, of each colour the picture twice, as two frames."""
    pixels = pictures(1)
    patches, (rows, columns) = reward.patches(pixels)
    assert (rows, columns) == (6, 8) and patches.shape == (1, 48, 3 * 2 * 4 * 4)
    normal = ((pixels[0] + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    at = 0
    for top in range(0, rows, 2):
        for left in range(0, columns, 2):
            for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                one = normal[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                torch.testing.assert_close(patches[0, at].view(3, 2, 4, 4), one[:, None].expand(-1, 2, -1, -1))
                at += 1


SIZES = [(1024, 1024, (448, 448)), (448, 448, (448, 448)), (100, 100, (448, 448)), (768, 1024, (364, 504)), (1024, 768, (504, 364))]


@pytest.mark.parametrize(("height", "width", "size"), [*SIZES, (30, 3000, (56, 4480))])
def test_sizes_are_those_of_hpsv3(height: int, width: int, size: tuple[int, int]) -> None:
    """28 * 28 * 256 pixels, sides of 28: 768 x 1024 scaled by 1.98 is 388 x 517, rounded down. Smaller ones are rounded up."""
    assert resized(height, width, 28, 256 * 28 * 28) == size


def test_a_head_of_one_layer() -> None:
    weight = torch.randn(2, 6)
    head = make_head({"weight": weight}, Path("x"))
    x = torch.randn(3, 6)
    torch.testing.assert_close(head(x), x @ weight.T)


def test_what_cannot_be_used_is_one_line(folder: Path, tmp_path: Path) -> None:
    import shutil

    def broken(name: str, **files: str | None) -> Path:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        for file, text in files.items():
            path = copy / {"reward": "reward.json", "model": "model.safetensors", "config": "config.json"}[file]
            path.unlink() if text is None else path.write_text(text)
        return copy

    weights = load_file(folder / "model.safetensors")
    headless, torn = broken("headless"), broken("torn")
    save_file({n: t for n, t in weights.items() if not n.startswith("rm_head")}, headless / "model.safetensors", metadata={"format": "pt"})
    save_file({n: t for n, t in weights.items() if "layers.1.mlp" not in n}, torn / "model.safetensors", metadata={"format": "pt"})
    for where, told in (
        (None, "got no folder"),
        (tmp_path / "nowhere", "no folder"),
        (broken("a", reward=None), r"reward.json: missing; write it"),
        (broken("b", reward='{"template": "how good? <|Reward|>"}'), "a template without {prompt}"),
        (broken("c", reward='{"template": "{prompt}"}'), "not with one"),
        (broken("d", reward='{"templat": "x"}'), "template"),
        (broken("e", config=None), "config.json: missing"),
        (broken("f", config='{"model_type": "qwen3_vl"}'), "expected 'qwen2_vl'"),
        (broken("g", config='{"model_type": "qwen2_vl", "text_config": 5}'), "no Qwen2-VL that transformers can read"),
        (headless, "no tensors rm_head"),
        (torn, "layers.1.mlp"),
    ):
        with pytest.raises(InputError, match=told) as error:
            open_vlm(where, torch.device("cpu"))
        assert "\n" not in str(error.value)
