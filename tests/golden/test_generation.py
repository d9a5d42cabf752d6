"""Whole generations against the reference's: contexts, velocities, latents, tokens, pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from archive import TINY, scenario
from PIL import Image
from torch import Tensor

from hyperbagel.data.transforms import ImageTransform
from hyperbagel.flow.guidance import guide
from hyperbagel.flow.schedule import time_grid
from hyperbagel.generate.decode import decode
from hyperbagel.generate.image import GuidedVelocity, decode_latents, denoise, draw_noise, latent_grid
from hyperbagel.generate.session import Branch, Parts, Session
from hyperbagel.generate.types import AskRequest, Denoising, ImageRequest
from hyperbagel.pipeline import HyperBagel

GENERATIONS = [
    "t2i_global",
    "t2i_channel",
    "t2i_textchannel_min",
    "t2i_nocfg",
    "t2i_gradio_img15",
    "t2i_think",
    "edit_textchannel",
    "edit_global",
    "edit_interval",
    "edit_think",
    "edit_two_images",
]
TOLERANCE = 5e-5


def bagel(dtype: torch.dtype = torch.float32) -> HyperBagel:
    parts = Parts.load(TINY, "cpu", dtype)
    # the transforms the golden data was made with
    return HyperBagel(replace(parts, vae_transform=ImageTransform(64, 32, 16), vit_transform=ImageTransform(112, 28, 14)), "tiny")


def picture(t: Tensor) -> Image.Image:
    return Image.fromarray(t.numpy())


def request(settings: dict[str, Any], golden: dict[str, Tensor]) -> ImageRequest:
    kwargs = settings["kwargs"]
    inputs = tuple(item if isinstance(item, str) else picture(golden[item["image"]]) for item in settings["inputs"])
    steps = kwargs.get("num_timesteps", 50) - 1
    return ImageRequest(
        inputs=inputs,
        seed=settings["seed"],
        size=tuple(settings["shape"]),
        think=kwargs.get("think", False),
        max_think_tokens=kwargs.get("max_think_token_n", 1) - 1,
        steps=steps,
        text_scale=kwargs["cfg_text_scale"],
        image_scale=kwargs.get("cfg_img_scale", 1.5),
        interval=tuple(kwargs["cfg_interval"]),
        renorm=kwargs["cfg_renorm_type"],
        renorm_min=kwargs["cfg_renorm_min"],
        shift=kwargs["timestep_shift"],
    )


@pytest.mark.parametrize("name", GENERATIONS)
@torch.inference_mode()
def test_generation_fp32(name: str) -> None:
    settings, golden = scenario(name)
    model = bagel()
    asked = request(settings, golden)
    ready = model._prepare(asked)
    if asked.think:
        model._think([asked], [ready])
    session, generator, thinking = ready.session, ready.generator, ready.thinking
    if settings["text"]:
        assert thinking == settings["text"][0]
    full, text, image = session.full(), session.text_dropped(), session.image_dropped()
    assert [full.length, full.position] == [settings["kv"][0], settings["rope"][0]]
    if asked.text_scale > 1:
        assert [text.length, text.position] == [n[0] for n in settings["cfg_text"]]
        assert [image.length, image.position] == [n[0] for n in settings["cfg_img"]]
    for prefix, branch in (("cache", full), ("cfg_text_cache", text), ("cfg_img_cache", image)):
        compare_cache(golden, prefix, branch)
    # one seed gives the reference's draws: VAE noise first, then the initial noise
    grid = latent_grid(model.parts.model.config, asked.size)
    noise = draw_noise(model.parts, grid, generator)
    assert torch.equal(noise, golden["init_noise"])
    seen: list[Tensor] = []
    latents, nfe = denoise([session], [grid], [noise], asked.denoising(), lambda k, n, x: seen.append(x[0]))
    free = session.image_dropped().cache is session.cache and asked.image_scale > 1 and asked.text_scale > 1
    saved = sum(lo < t <= hi for t in settings["timesteps"] for lo, hi in [asked.denoising().interval]) if free else 0
    assert nfe == settings["nfe"] - saved  # an image branch without images is the full branch: we do not evaluate it again
    velocity = GuidedVelocity([session], [grid], asked.denoising())
    for i, t in enumerate(settings["timesteps"]):
        torch.testing.assert_close(velocity(golden[f"x_t.{i}"][None], t)[0], golden[f"v_t.{i}"], atol=TOLERANCE, rtol=0)
        if i:
            torch.testing.assert_close(seen[i - 1], golden[f"x_t.{i}"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(latents[0], golden["final_latent"], atol=TOLERANCE, rtol=0)
    ours = torch.from_numpy(np.asarray(decode_latents(model.parts, latents[0], grid)).astype(int))
    assert (ours - golden["output_image"].int()).abs().max() <= 1


def compare_cache(golden: dict[str, Tensor], prefix: str, branch: Branch) -> None:
    """The reference keeps a latent block as [start, latents, end], we as [start, end, latents]: attention does not care for the order
    of its keys. So each of our slots is matched with the reference's nearest, by the keys and values of all layers together."""
    if f"{prefix}.key.0" not in golden:
        return
    layers = range(len(branch.cache.k))
    ours = torch.cat(
        [x[0, :, : branch.length].transpose(0, 1).flatten(1) for i in layers for x in (branch.cache.k[i], branch.cache.v[i])], 1
    )
    theirs = torch.cat([golden[f"{prefix}.{kind}.{i}"].flatten(1) for i in layers for kind in ("key", "value")], 1)
    order = torch.cdist(ours.double(), theirs.double()).argmin(1)
    assert sorted(order.tolist()) == list(range(len(theirs)))
    torch.testing.assert_close(ours, theirs[order], atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_batch_of_two_sizes() -> None:
    """The reference takes its global norm over the whole packed batch; per-sample velocities and, with that norm, latents are equal."""
    settings, golden = scenario("t2i_batch2")
    model = bagel()
    sessions = []
    for prompt in settings["prompts"]:
        session = Session.new(model.parts)
        session.add_text(prompt)
        sessions.append(session)
    grids = [latent_grid(model.parts.model.config, tuple(size)) for size in settings["image_sizes"]]
    counts = [h * w for h, w in grids]
    scale, x = settings["cfg_text_scale"], golden["init_noise"]
    times = time_grid(settings["num_timesteps"] - 1, 3.0)
    both = Denoising(text_scale=1.0)
    conditional = GuidedVelocity(sessions, grids, both)
    unconditional = GuidedVelocity([Session.new(model.parts) for _ in sessions], grids, both)
    for i, t in enumerate(settings["timesteps"]):
        padded = torch.nn.utils.rnn.pad_sequence(list(x.split(counts)), batch_first=True)
        v, v_text = (torch.cat([row[:n] for row, n in zip(f(padded, t), counts)]) for f in (conditional, unconditional))
        torch.testing.assert_close(v, golden[f"branch_pred.{2 * i}"], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(v_text, golden[f"branch_pred.{2 * i + 1}"], atol=TOLERANCE, rtol=0)
        guided = guide(v[None], v_text[None], None, scale, 1.0, "global")[0]
        torch.testing.assert_close(guided, golden[f"v_t.{i}"], atol=TOLERANCE, rtol=0)
        x = x - guided * (times[i] - times[i + 1])
    torch.testing.assert_close(x, torch.cat([golden["final_latent.0"], golden["final_latent.1"]]), atol=TOLERANCE, rtol=0)


def answer_session(model: HyperBagel, name: str, settings: dict[str, Any], golden: dict[str, Tensor]) -> tuple[Session, int]:
    if name == "chat_two_images":  # the reference's chat(): no latent resize, one prompt
        session = Session.new(model.parts)
        for i in range(2):
            session.add_image(picture(golden[f"input_image.{i}"]), latents=False, resize=False)
        session.add_text(settings["prompt"])
        return session, settings["max_length"]
    images = tuple(picture(golden[item["image"]]) for item in settings["inputs"] if not isinstance(item, str))
    kwargs = settings["kwargs"]
    asked = AskRequest(settings["inputs"][-1], images, think=kwargs.get("think", False))
    return model._context(asked), kwargs["max_think_token_n"]


@pytest.mark.parametrize("name", ["und", "und_think", "text_only", "chat_two_images"])
@torch.inference_mode()
def test_answers_fp32(name: str) -> None:
    settings, golden = scenario(name)
    model = bagel()
    session, length = answer_session(model, name, settings, golden)
    out = decode([session], max_tokens=length - 1, keep_logits=True)[0]
    tokens = golden.get("gen_tokens.0", golden.get("gen_tokens"))
    assert [model.parts.tokenizer.im_start, *out.ids] == tokens.flatten().tolist()
    theirs = golden["logits"][:, 0]
    torch.testing.assert_close(torch.stack(out.logits[: len(theirs)]), theirs, atol=2e-5, rtol=0)
    text = settings["text"] if isinstance(settings["text"], str) else settings["text"][0]
    assert model.parts.tokenizer.decode(out.ids) == text


@pytest.mark.parametrize("name", [n for n in GENERATIONS if not n.endswith("think")])
@torch.inference_mode()
def test_generation_bf16(name: str) -> None:
    """bf16 weights and activations, against the reference in bf16 (velocities) and in fp32 (both; two bf16 roundings would add up)."""
    settings, golden = scenario(name, "bf16")
    exact = scenario(name)[1]
    model = bagel(torch.bfloat16)
    asked = request(settings, golden)
    ready = model._prepare(asked)
    session, generator = ready.session, ready.generator
    grid = latent_grid(model.parts.model.config, asked.size)
    noise = draw_noise(model.parts, grid, generator)
    velocity = GuidedVelocity([session], [grid], asked.denoising())
    for i, t in enumerate(settings["timesteps"]):
        # the reference's own bf16 is up to 0.042 away from its fp32; against that bf16 both roundings add up
        for told, bound in ((exact, 0.045), (golden, 0.065)):
            assert relative(velocity(told[f"x_t.{i}"][None], t)[0], told[f"v_t.{i}"]) < bound
    latents, _ = denoise([session], [grid], [noise], asked.denoising())
    assert relative(latents[0], exact["final_latent"]) < 0.02


@pytest.mark.parametrize("name", ["und", "text_only", "chat_two_images"])
@torch.inference_mode()
def test_answers_bf16_on_forced_tokens(name: str) -> None:
    settings, golden = scenario(name, "bf16")
    model = bagel(torch.bfloat16)
    session, _ = answer_session(model, name, settings, golden)
    tokens = golden.get("gen_tokens.0", golden.get("gen_tokens")).flatten()
    bag, n = model.parts.model, len(tokens)
    from hyperbagel.model.qwen2_mot import Streams

    session.settle()  # im_start is the first of the tokens
    where = torch.arange(session.position, session.position + n)[None]
    hidden = bag.backbone(
        Streams(bag.embed_text(tokens[None]), None), where, cache=session.cache, plan=session.cache.plan([n], causal=True)
    )
    assert relative(bag.logits(hidden.u[0]).float(), golden["logits"][:n, 0].float()) < 0.045


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())
