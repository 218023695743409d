"""The hook on unmodified pipelines: what it computes, and what it leaves alone."""

import threading

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from expunge import backbones
from expunge.concepts import Concept
from expunge.errors import UserError
from expunge.sampling.denoiser_hook import Guidance, guide_denoiser
from expunge.sampling.samplers.negative_prompt import NegativePrompt
from expunge.sampling.samplers.sld import Sld
from expunge.sampling.text_guidance import away, sld

BOMB = Concept(targets=["a bomb", "a grenade"])
PROMPTS, SEEDS = ["a bomb", "a cat face", "a key"], [1, 2, 3]
# Strong from the first step on, and with a threshold that leaves a part of the picture alone.
STRONG = Sld(preset="strong", warmup=1, threshold=0.0)


@pytest.fixture
def sdxl(tiny_sdxl):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts=PROMPTS, seeds=SEEDS, **more):
    more = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"} | more
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(prompts, generator=generators, **more).images


@torch.no_grad()
def three_branches(pipeline, prompts, seeds, combine, s=5.0, steps=4):
    """What the hook must amount to, without hook and pipeline: three branches in one loop."""
    device = pipeline.device
    ep = torch.cat([pipeline.encode_prompt(p, device, 1, False)[0] for p in prompts])
    e0, eh = (
        pipeline.encode_prompt(text, device, 1, False)[0].expand_as(ep)
        for text in ("", ", ".join(BOMB.targets))
    )
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    x = torch.cat([
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]) * scheduler.init_noise_sigma  # fmt: skip
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        predictions = [pipeline.unet(scaled, t, c).sample for c in (e0, ep, eh)]
        x = scheduler.step(combine(i, *predictions, scaled, t, s), t, x).prev_sample
    return x


def sld_loop(how):
    ν = 0.0

    def combine(i, e0, ep, eh, x_t, t, s):
        nonlocal ν
        ε, ν = sld(e0, ep, eh, s, ν, i, how)
        return ε

    return combine


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_sld_equals_an_explicit_loop_of_three_branches(pipeline, scheduler) -> None:
    cls = getattr(diffusers, scheduler)
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
    found = draw(STRONG.wrap(pipeline, BOMB))
    wanted = three_branches(pipeline, PROMPTS, SEEDS, sld_loop(STRONG.strength))
    # Euler's latents reach 15, and SLD multiplies a difference by up to 2,000 before it clamps it.
    assert (found - wanted).abs().max() < 2e-3
    assert (found - draw(pipeline)).abs().max() > 0.01


def test_a_weighted_negative_prompt_equals_an_explicit_loop(pipeline) -> None:
    found = draw(NegativePrompt(weight=1.5).wrap(pipeline, BOMB))
    wanted = three_branches(
        pipeline, PROMPTS, SEEDS, lambda i, e0, ep, eh, x, t, s: away(e0, ep, eh, s, 1.5)
    )
    assert (found - wanted).abs().max() < 1e-3


def test_a_v_prediction_model_is_guided_in_epsilon(tiny_sd2) -> None:
    pipeline = backbones.load_pipeline(tiny_sd2)
    scheduler, how = pipeline.scheduler, STRONG.strength
    ν = 0.0

    def combine(i, v0, vp, vh, x_t, t, s):
        nonlocal ν
        ᾱ = scheduler.alphas_cumprod[t]
        a, b = ᾱ.sqrt(), (1 - ᾱ).sqrt()
        ε, ν = sld(*(a * v + b * x_t for v in (v0, vp, vh)), s, ν, i, how)
        return (ε - b * x_t) / a

    found = draw(STRONG.wrap(pipeline, BOMB))
    assert (found - three_branches(pipeline, PROMPTS, SEEDS, combine)).abs().max() < 1e-4
    assert torch.equal(draw(Sld(scale=0.0, warmup=0).wrap(pipeline, BOMB)), draw(pipeline))


def test_no_strength_changes_no_bit(pipeline, sdxl) -> None:
    for model in (pipeline, sdxl):
        plain = draw(model)
        for sampler in (Sld(scale=0.0, warmup=0), Sld(warmup=4), NegativePrompt(weight=0.0)):
            assert torch.equal(draw(sampler.wrap(model, BOMB)), plain)


def test_a_negative_prompt_is_the_pipelines_own(pipeline, sdxl) -> None:
    for model in (pipeline, sdxl):
        own = draw(model, negative_prompt=["a bomb, a grenade"] * 3)
        # The pipeline encodes the text once per prompt, which may round the last bit otherwise.
        assert (draw(NegativePrompt().wrap(model, BOMB)) - own).abs().max() < 1e-4
        assert (own - draw(model)).abs().max() > 0.01


def test_a_sample_does_not_depend_on_its_batch(pipeline) -> None:
    guarded = STRONG.wrap(pipeline, BOMB)
    together = draw(guarded)
    for i in range(3):
        alone = draw(guarded, PROMPTS[i : i + 1], SEEDS[i : i + 1])
        assert (together[i] - alone[0]).abs().max() < 1e-4
    repeated = draw(guarded, PROMPTS[:1], SEEDS, num_images_per_prompt=3)
    assert (repeated[0] - together[0]).abs().max() < 1e-4


def test_every_call_starts_anew(pipeline) -> None:
    guarded = Sld(preset="max").wrap(pipeline, BOMB)
    first = draw(guarded)
    draw(guarded, PROMPTS[:2], SEEDS[:2])
    assert torch.equal(draw(guarded), first)


def test_the_original_is_unaffected(pipeline) -> None:
    before = draw(pipeline)
    guarded = Sld(preset="max").wrap(pipeline, BOMB)
    assert guarded.unet is pipeline.unet
    assert (draw(guarded) - before).abs().max() > 0.01
    assert torch.equal(draw(pipeline), before)
    assert not pipeline.unet._forward_hooks
    assert not pipeline.unet._forward_pre_hooks


def test_an_error_leaves_no_hook_behind(pipeline) -> None:
    def fail(*_):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        draw(STRONG.wrap(pipeline, BOMB), callback_on_step_end=fail)
    assert not pipeline.unet._forward_hooks
    assert not pipeline.unet._forward_pre_hooks


def test_another_thread_may_use_the_original_meanwhile(pipeline) -> None:
    plain, found = draw(pipeline), []
    other = backbones.load_pipeline(pipeline.config._name_or_path)
    other.unet = pipeline.unet

    def meanwhile(pipe, i, t, kwargs):
        thread = threading.Thread(target=lambda: found.append(draw(other)))
        thread.start()
        thread.join()
        return {}

    draw(STRONG.wrap(pipeline, BOMB), callback_on_step_end=meanwhile)
    assert len(found) == 4
    assert all(torch.equal(x, plain) for x in found)


@pytest.mark.parametrize("model", ["tiny_sd1", "tiny_sdxl"])
def test_it_is_saved_as_what_it_was(model, request, tmp_path) -> None:
    plain = DiffusionPipeline.from_pretrained(request.getfixturevalue(model))
    STRONG.wrap(plain, BOMB).save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(again) is type(plain)
    assert torch.equal(draw(again), draw(plain))


def test_two_samplers_compose(pipeline) -> None:
    weighted = NegativePrompt(weight=1.5)
    found = draw(weighted.wrap(STRONG.wrap(pipeline, BOMB), BOMB))
    one, other = draw(STRONG.wrap(pipeline, BOMB)), draw(weighted.wrap(pipeline, BOMB))
    assert (found - one).abs().max() > 0.01
    assert (found - other).abs().max() > 0.01


def test_without_classifier_free_guidance_it_refuses(pipeline) -> None:
    for s in (1.0, 0.0):
        with pytest.raises(UserError, match=rf"got guidance_scale {s}; allowed: above 1"):
            draw(STRONG.wrap(pipeline, BOMB), guidance_scale=s)

    def switch_off(pipe, i, t, kwargs):
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": kwargs["prompt_embeds"].chunk(2)[1]}

    with pytest.raises(UserError, match=r"got guidance_scale 0\.0"):
        draw(
            STRONG.wrap(pipeline, BOMB),
            callback_on_step_end=switch_off,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )


def test_a_unet_that_is_never_called_is_an_error(pipeline) -> None:
    class Idle(type(pipeline)):
        def __call__(self, *args, **kwargs):
            return None

    pipeline.__class__ = Idle
    idle = STRONG.wrap(pipeline, BOMB)
    with pytest.raises(UserError, match="never called its UNet"):
        idle("a bomb")


def test_a_unet_that_is_exchanged_afterwards_is_the_one_that_is_watched(pipeline) -> None:
    guarded = STRONG.wrap(pipeline, BOMB)
    wanted = draw(guarded)
    guarded.unet = backbones.load_pipeline(pipeline.config._name_or_path).unet
    assert torch.equal(draw(guarded), wanted)


def test_what_it_cannot_guide_is_refused() -> None:
    with pytest.raises(UserError, match="no UNet"):
        STRONG.wrap(object(), BOMB)


def test_a_concept_that_does_not_fit_the_encoder_is_refused(pipeline) -> None:
    many = Concept(targets=["a bomb"] * 60)
    with pytest.raises(UserError, match="allowed: 24, all its targets together"):
        draw(STRONG.wrap(pipeline, many))


@pytest.mark.parametrize(
    "more",
    [{"negative_prompt": ["blurred"] * 3}, {"negative_prompt_embeds": torch.zeros(3, 24, 32)}],
    ids=["text", "embeddings"],
)
def test_a_negative_prompt_besides_is_kept_or_refused(pipeline, more) -> None:
    with pytest.raises(UserError, match="whose place the concept takes"):
        draw(NegativePrompt().wrap(pipeline, BOMB), **more)
    kept = draw(NegativePrompt(weight=0.0).wrap(pipeline, BOMB), **more)
    assert torch.equal(kept, draw(pipeline, **more))
    draw(NegativePrompt().wrap(pipeline, BOMB), negative_prompt=[""] * 3)


@pytest.mark.parametrize(
    ("scheduler", "calls", "steps"),
    [
        ("DDIMScheduler", [0, 1, 2, 3], 4),
        ("DPMSolverMultistepScheduler", [0, 1, 2, 3], 4),
        # Two calls a step, the last one apart.
        ("HeunDiscreteScheduler", [0, 0, 1, 1, 2, 2, 3], 4),
        # One additional call, as diffusers counts it too.
        ("PNDMScheduler", [0, 1, 2, 3, 4], 5),
    ],
)
def test_steps_are_the_schedulers(pipeline, scheduler, calls, steps) -> None:
    options = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    config = pipeline.scheduler.config
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(config, **options)
    seen = []

    def guided(call):
        seen.append((call.step, call.steps))

    guarded = guide_denoiser(pipeline, lambda pipe, arguments: Guidance(guided=guided))
    assert torch.equal(draw(guarded), draw(pipeline))
    assert seen == [(step, steps) for step in calls]


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_the_clean_picture_that_it_sees_is_the_schedulers(pipeline, scheduler) -> None:
    from expunge.prediction import to_x0

    config = pipeline.scheduler.config
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(config)
    seen, wanted = [], []

    def guided(call):
        seen.append(to_x0(call.plain, call.x_t, call.ᾱ))

    step = pipeline.scheduler.step

    def recorded(output, t, x, **kwargs):
        kwargs.pop("return_dict")
        done = step(output, t, x, **kwargs)
        wanted.append(done.pred_original_sample)
        return (done.prev_sample,)

    guarded = guide_denoiser(pipeline, lambda pipe, arguments: Guidance(guided=guided))
    pipeline.scheduler.step = recorded
    draw(guarded)
    for x0, exact in zip(seen, wanted, strict=True):
        torch.testing.assert_close(x0, exact, atol=1e-4, rtol=1e-4)
