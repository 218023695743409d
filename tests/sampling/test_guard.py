"""The guard on tiny real pipelines, with densities whose answer is known."""

from dataclasses import replace

import diffusers
import pytest
import torch

from expunge.sampling.correction import Correction
from expunge.sampling.guard import guard
from expunge.sampling.safe_scheduler import SafeScheduler
from guarded import GRADIENT, TEXT, Brightness, draw, scores


def test_a_threshold_that_is_never_reached_changes_no_bit(pipeline) -> None:
    guarded = guard(pipeline, Brightness(2.0), how=GRADIENT)
    assert torch.equal(draw(guarded), draw(pipeline))
    assert not any(any(step.fired) for step in guarded.trace.steps)
    assert len(guarded.trace.steps) == 4


@pytest.mark.parametrize("scale", ["normalised", "published"])
def test_a_density_that_fires_is_lowered(pipeline, scale) -> None:
    density = Brightness(0.0)
    strength = {"normalised": 3.0, "published": 300.0}[scale]
    how = replace(GRADIENT, strength=strength, scale=scale)
    before = scores(draw(pipeline), density)
    after = scores(draw(guard(pipeline, density, how=how)), density)
    assert (after < before - 0.02).all()


@pytest.mark.parametrize(
    "more",
    [{"copies": 3}, {"repeats": 3}, {"momentum": 0.5}, {"smooth": 1.0}, {"schedule": "cosine"},
     {"schedule": "window"}, {"schedule": [1.0, 0.5]}, {"release": 1.0}, {"start": 0.5},
     {"every": 2}],
    ids=str,
)  # fmt: skip
def test_every_way_to_correct_lowers_it_too(pipeline, more) -> None:
    density = Brightness(0.0)
    before = scores(draw(pipeline), density)
    how = replace(GRADIENT, **more)
    assert (scores(draw(guard(pipeline, density, how=how)), density) < before).all()


def test_only_the_sample_that_fires_is_changed(pipeline) -> None:
    plain = draw(pipeline)
    values = scores(plain, Brightness(0.0)).sort().values
    # Between the brightest and the next, in the finished pictures and nearly so before.
    density = Brightness(float(values[-2:].mean()))
    guarded = guard(pipeline, density, how=GRADIENT)
    mixed = draw(guarded)
    fired = torch.tensor([step.fired for step in guarded.trace.steps]).any(0)
    assert fired.any()
    assert not fired.all()
    changed = (mixed != plain).flatten(1).any(1)
    assert torch.equal(changed, fired)
    for i in (~fired).nonzero().flatten().tolist():
        assert torch.equal(mixed[i], plain[i])


SCHEDULERS = ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "PNDM"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_against_the_empty_text_the_prompt_is_gone(pipeline, name) -> None:
    """e0 + s (ep − e0) − s ((ep − e0) + w (e_h − e0)) = e0 where h is the empty text."""
    config = pipeline.scheduler.config
    pipeline.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
    guarded = draw(guard(pipeline, Brightness(0.0), how=TEXT, texts=[""]), ["a bomb"])
    empty = draw(pipeline, [""], guidance_scale=1.0)
    assert torch.allclose(guarded, empty, atol=2e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_text_direction_is_its_formula(pipeline, scale) -> None:
    """One step with ẽ = e0 − w s (e_h − e0), from predictions made on their own."""
    guarded = guard(pipeline, Brightness(0.0), how=replace(TEXT, strength=2.0), texts=["a key"])
    more = {"num_inference_steps": 1, "output_type": "latent"}
    found = draw(guarded, ["a bomb"], guidance_scale=scale, **more)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    (t,) = guarded.scheduler.timesteps
    e_0, e_h = (
        pipeline.unet(noise, t, pipeline.encode_prompt(text, "cpu", 1, False)[0]).sample
        for text in ("", "a key")
    )
    pipeline.scheduler.set_timesteps(1)
    expected = pipeline.scheduler.step(e_0 - 2 * scale * (e_h - e_0), t, noise).prev_sample
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_the_text_is_encoded_as_the_prompt_is(tiny_sdxl) -> None:
    """Where prompt and concept are one text, ep = e_h, under clip_skip as well.

    On SDXL: on SD 1.x diffusers 0.42 cannot skip with transformers 5.
    """
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny_sdxl)
    guarded = guard(pipeline, Brightness(0.0), how=TEXT)
    found = []
    under = guarded._guard._against_text

    def spy(x0, w):
        branch = guarded._guard.branch
        e_p, _, _ = branch.pair()
        found.append((branch.under(torch.tensor([0]), ["a bomb"]), e_p))
        return under(x0, w)

    guarded._guard._against_text = spy
    draw(guarded, ["a bomb"], clip_skip=1, num_inference_steps=1)
    draw(guarded, ["a bomb"], num_inference_steps=1)
    (skipped, prompt), (whole, _) = found
    assert torch.allclose(skipped, prompt, atol=1e-5)
    assert not torch.allclose(skipped, whole, atol=1e-3)


def test_only_where_the_concept_is_seen_the_prediction_changes(pipeline) -> None:
    """A density of the left half alone: in the first step nothing changes to the right of it."""

    class Left(Brightness):
        def per_concept(self, images):
            return super().per_concept(images[..., : images.shape[-1] // 2])

    changes = []
    for how in (TEXT, replace(TEXT, places=4)):
        guarded = guard(pipeline, Left(0.0), how=how)
        worker = guarded._guard
        correction = worker.correction

        def spy(scheduler, output, t, x_t, correction=correction):
            changes.append(correction(scheduler, output, t, x_t))
            return changes[-1]

        worker.correction = spy
        draw(guarded, ["a bomb"], num_inference_steps=1)
    everywhere, left = (change.abs().mean((0, 1, 2)) for change in changes)
    assert left[:3].mean() > 0.3 * everywhere[:3].mean()
    assert left[-1] < 0.05 * everywhere[-1]


class Halves(Brightness):
    """Two concepts: how bright the left half is, and the right one."""

    names = texts = ("a bomb", "a key")

    def __init__(self, left: float, right: float):
        self.thresholds = torch.tensor([left, right])

    def per_concept(self, images):
        half = images.shape[-1] // 2
        means = [x.mean((1, 2, 3)) for x in (images[..., :half], images[..., half:])]
        return torch.sigmoid(4 * torch.stack(means, 1))


def test_every_concept_that_fires_is_steered_away_from(pipeline) -> None:
    """With one text for both, two that fire count twice: −2 w s (e_h − e0)."""
    both = guard(pipeline, Halves(0.0, 0.0), texts=["a bomb", "a bomb"], how=TEXT)
    twice = guard(pipeline, Brightness(0.0), how=replace(TEXT, strength=2.0))
    assert torch.allclose(draw(both), draw(twice), atol=1e-5)
    one = guard(pipeline, Halves(0.0, 2.0), texts=["a bomb", "a key"], how=TEXT)
    assert torch.equal(draw(one), draw(guard(pipeline, Brightness(0.0), how=TEXT)))


class Script(Halves):
    """Two concepts whose scores are written down, look by look."""

    def __init__(self, *looks):
        super().__init__(0.5, 0.5)
        self.looks = iter(looks)

    def per_concept(self, images):
        return torch.tensor(next(self.looks)).expand(len(images), 2)


def test_what_was_seen_is_seen_until_it_is_well_below(pipeline) -> None:
    density = Script([0.6, 0.2], [0.4, 0.4], [0.4, 0.6], [0.3, 0.4])
    guarded = guard(pipeline, density, how=replace(TEXT, release=0.7))
    worker, seen, asked = guarded._guard, [], []
    against = worker._against_text

    def spy(x0, w):
        seen.append(worker.seen[0].tolist())
        under = worker.branch.under
        worker.branch.under = lambda rows, texts: asked.append(texts) or under(rows, texts)
        return against(x0, w)

    worker._against_text = spy
    draw(guarded, ["a key"])
    assert seen == [[True, False], [True, False], [True, True], [False, True]]
    assert [step.fired for step in guarded.trace.steps] == [[True]] * 4


def test_what_is_gone_costs_no_branch_and_is_not_prompted_for_again(pipeline) -> None:
    """Seen in the first step alone: then ẽ = e0 to the end, and nothing more is predicted."""
    guarded = guard(
        pipeline, Script([0.6, 0.0], *[[0.0, 0.0]] * 3), how=replace(TEXT, strength=1e-6)
    )
    calls = []
    handle = pipeline.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    found = draw(guarded, ["a bomb"])
    handle.remove()
    assert len(calls) == 5
    assert torch.allclose(found, draw(pipeline, [""], guidance_scale=1.0), atol=2e-5)


def test_what_is_gone_is_not_looked_for_again(pipeline) -> None:
    """A look in each of four steps, and one map, of the step in which it was seen."""
    density = Script([0.6, 0.0], [0.0, 0.0], *[[0.0, 0.0]] * 3)
    draw(guard(pipeline, density, how=replace(TEXT, places=2, refresh=1)), ["a key"])
    assert next(density.looks, None) is None


def test_what_is_below_zero_is_left_alone(pipeline) -> None:
    """A cosine that was pushed below 0 has no logarithm, and nothing left to descend."""

    class Signed(Brightness):
        def per_concept(self, images):
            return super().per_concept(images) - 2

    strong = Correction(direction="gradient", strength=5.0)
    assert torch.equal(draw(guard(pipeline, Signed(-3.0), how=strong)), draw(pipeline))


def test_the_pipeline_itself_stays_unguarded_and_saves_as_what_it_was(pipeline, tmp_path) -> None:
    before = draw(pipeline)
    guarded = guard(pipeline, Brightness(0.0), how=GRADIENT)
    draw(guarded)
    assert torch.equal(draw(pipeline), before)
    assert not isinstance(pipeline.scheduler, SafeScheduler)
    assert isinstance(guarded, diffusers.StableDiffusionPipeline)
    guarded.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is diffusers.DDIMScheduler
    assert torch.equal(draw(again), before)


def test_several_pictures_of_a_prompt(pipeline) -> None:
    guarded = guard(pipeline, Brightness(0.0), how=TEXT)
    images = draw(guarded, ["a bomb"], seeds=(1,), num_images_per_prompt=1)
    many = guarded(
        ["a bomb", "a key"],
        num_images_per_prompt=2,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(i) for i in range(4)],
        output_type="pt",
    ).images
    assert len(images) == 1
    assert len(many) == 4
    assert [len(step.fired) for step in guarded.trace.steps] == [4, 4]


def test_half_precision_is_judged_in_full(pipeline) -> None:
    class Spy(Brightness):
        def per_concept(self, images):
            assert images.dtype == torch.float32
            return super().per_concept(images)

    pipeline = pipeline.to(torch.bfloat16)
    images = draw(guard(pipeline, Spy(0.0), how=GRADIENT))
    assert torch.isfinite(images.float()).all()
