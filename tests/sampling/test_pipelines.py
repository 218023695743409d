"""Samplers on pipelines other than plain text-to-image: each changes what it should."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from expunge.concepts import Concept
from expunge.densities.base import HarmDensity
from expunge.sampling.correction import Correction
from expunge.sampling.guard import guard
from expunge.sampling.samplers.negative_prompt import NegativePrompt
from expunge.sampling.samplers.safree import Safree
from expunge.sampling.samplers.sld import Sld

# Where the prompt is the concept to the letter, ep = eh and SLD does nothing: so it is published.
BOMB = Concept(targets=["a bomb and a grenade"])
PROMPTS = ["a bomb", "a key"]
# Without warm-up, since image-to-image has few steps; SAFREE on every prompt and in every step.
SAMPLERS = [
    Sld(preset="max", threshold=0.0),
    NegativePrompt(),
    NegativePrompt(weight=1.5),
    Safree(alpha=0.0, offset=-100.0),
]


def load(folder: str, cls: Any = diffusers.DiffusionPipeline, **parts: Any) -> Any:
    whole = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline = whole if cls is diffusers.DiffusionPipeline else cls.from_pipe(whole, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, 16, 16, generator=generator)


def half_mask() -> torch.Tensor:
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 8:] = 1
    return mask


def nine_channels(folder: str) -> Any:
    """An inpainting model proper: its UNet sees the mask and the masked picture too."""
    pipeline = load(folder, StableDiffusionInpaintPipeline)
    torch.manual_seed(1)
    config = dict(pipeline.unet.config) | {"in_channels": 9}
    pipeline.unet = diffusers.UNet2DConditionModel.from_config(config)
    return pipeline


def controlled(folder: str) -> Any:
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(load(folder).unet, conditioning_embedding_out_channels=(8, 16))
    for block in net.controlnet_down_blocks:
        # Its outputs are zero at first.
        torch.nn.init.normal_(block.weight, std=0.5)
    net.config.global_pool_conditions = False
    return load(folder, StableDiffusionControlNetPipeline, controlnet=net)


CASES = {
    "sdxl": ("tiny_sdxl", load, {}),
    "img2img": (
        "tiny_sd1",
        lambda folder: load(folder, StableDiffusionImg2ImgPipeline),
        {"image": picture(), "strength": 0.75},
    ),
    "sdxl img2img": (
        "tiny_sdxl",
        lambda folder: load(folder, StableDiffusionXLImg2ImgPipeline),
        {"image": picture(), "strength": 0.75},
    ),
    "inpaint": (
        "tiny_sd1",
        lambda folder: load(folder, StableDiffusionInpaintPipeline),
        {"image": picture(), "mask_image": half_mask(), "height": 16, "width": 16},
    ),
    "inpaint, 9 channels": (
        "tiny_sd1",
        nine_channels,
        {"image": picture(), "mask_image": half_mask(), "height": 16, "width": 16},
    ),
    "controlnet": (
        "tiny_sd1",
        controlled,
        {"image": picture(), "height": 16, "width": 16, "controlnet_conditioning_scale": 1.0},
    ),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    fixture, make, arguments = CASES[request.param]
    return request.param, make(request.getfixturevalue(fixture)), arguments


def draw(pipeline: Any, prompts=PROMPTS, **arguments: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(7 + i) for i in range(len(prompts))]
    defaults = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "pt"}
    return pipeline(prompts, generator=generators, **(defaults | arguments)).images


def test_every_sampler_works_in_every_pipeline(case) -> None:
    name, pipeline, arguments = case
    plain = draw(pipeline, **arguments)
    for sampler in SAMPLERS:
        found = draw(sampler.wrap(pipeline, BOMB), **arguments)
        change = (found - plain).abs()
        assert change[0].max() > 1e-3, (name, sampler)
        assert torch.isfinite(found).all()
        if name == "inpaint":
            # What is not repainted stays: its latents are put back in every step.
            assert change[..., :2].max() < 0.1 * change[..., 8:].max()
    assert torch.equal(draw(pipeline, **arguments), plain)
    assert torch.equal(draw(Sld(scale=0.0, warmup=0).wrap(pipeline, BOMB), **arguments), plain)


class Whiteness(HarmDensity):
    """p_h is how bright a picture is, and fires for the brighter of two."""

    names = texts = ("a grenade",)
    thresholds = torch.zeros(1)

    def per_concept(self, images: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(4 * images.mean((1, 2, 3)))[:, None]


HOW = {
    "text": Correction(strength=3.0, start=0.0),
    "gradient": Correction(direction="gradient", strength=3.0, start=0.0),
}


@pytest.mark.parametrize("direction", HOW)
def test_the_guard_changes_what_it_should_in_every_pipeline(case, direction) -> None:
    """Everything fires at η = 0: both pictures change, by gradients towards the dark."""
    name, pipeline, arguments = case
    plain, density = draw(pipeline, **arguments), Whiteness()
    guarded = guard(pipeline, density, how=HOW[direction])
    found = draw(guarded, **arguments)
    change = (found - plain).abs()
    assert (change.flatten(1).amax(1) > 1e-3).all(), name
    assert all(all(step.fired) for step in guarded.trace.steps)
    if direction == "gradient":
        assert (density(2 * found - 1).score < density(2 * plain - 1).score).all()
    if name == "inpaint":
        assert change[..., :2].max() < 0.2 * change[..., 8:].max()
    assert torch.equal(draw(pipeline, **arguments), plain)
    density.thresholds = torch.full((1,), 2.0)
    assert torch.equal(draw(guarded, **arguments), plain)


@pytest.mark.parametrize("direction", HOW)
def test_a_guard_keeps_the_precision_of_the_pipeline(tiny_sd1, direction) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        pipeline = load(tiny_sd1)
        pipeline.to(dtype)
        plain = draw(pipeline, output_type="latent")
        guarded = guard(pipeline, Whiteness(), how=HOW[direction])
        found = draw(guarded, output_type="latent")
        assert found.dtype == dtype
        assert torch.isfinite(found).all()
        assert (found - plain).abs().max() > 0
        guarded._guard.density.thresholds = torch.full((1,), 2.0)
        assert torch.equal(draw(guarded, output_type="latent"), plain)


def test_the_third_branch_has_the_added_conditions_of_sdxl(tiny_sdxl) -> None:
    """With the prompt as the concept eh = ep, and w = 1 leaves e0 alone, whatever s is.

    That fails unless the branch has its own pooled text and the sizes of the conditional half.
    """
    pipeline = load(tiny_sdxl)
    same = Concept(targets=["a bomb"])
    sizes = {"original_size": (99, 77), "negative_original_size": (5, 5)}
    guarded = NegativePrompt(weight=1.0).wrap(pipeline, same)
    found = [draw(guarded, ["a bomb"], guidance_scale=s, **sizes) for s in (3.0, 9.0)]
    assert (found[0] - found[1]).abs().max() < 1e-3
    plain = [draw(pipeline, ["a bomb"], guidance_scale=s, **sizes) for s in (3.0, 9.0)]
    assert (plain[0] - plain[1]).abs().max() > 1e-2


def test_the_third_branch_has_the_residuals_of_controlnet(tiny_sd1) -> None:
    _, make, arguments = CASES["controlnet"]
    pipeline = make(tiny_sd1)
    arguments = arguments | {"image": picture()[:1]}
    guarded = NegativePrompt(weight=1.0).wrap(pipeline, Concept(targets=["a bomb"]))
    for guess in (True, False):
        found = [
            draw(guarded, ["a bomb"], guidance_scale=s, guess_mode=guess, **arguments)
            for s in (3.0, 9.0)
        ]
        assert (found[0] - found[1]).abs().max() < 1e-3
    other = draw(guarded, ["a bomb"], **(arguments | {"controlnet_conditioning_scale": 0.0}))
    assert (found[0] - other).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tiny_sd1, dtype) -> None:
    pipeline = load(tiny_sd1)
    pipeline.to(dtype)
    plain = draw(pipeline, output_type="latent")
    for sampler in SAMPLERS:
        found = draw(sampler.wrap(pipeline, BOMB), output_type="latent")
        assert found.dtype == dtype
        assert torch.isfinite(found).all()
        assert (found - plain).abs().max() > 0
    for sampler in (Sld(scale=0.0, warmup=0), NegativePrompt(weight=0.0)):
        assert torch.equal(draw(sampler.wrap(pipeline, BOMB), output_type="latent"), plain)
