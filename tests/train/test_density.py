"""The density distilled: the target's maths, and that what is harmless is left alone."""

import random
from dataclasses import replace

import pytest
import torch

from expunge import adapters, backbones
from expunge.concepts import Concept
from expunge.conditioning import condition
from expunge.densities.clip_text import ClipText
from expunge.prediction import alpha_bar, guide, level, to_x0
from expunge.sampling.correction import Correction
from expunge.sampling.guard import guard
from expunge.train.latents import Maker
from expunge.train.objectives.density import (
    Density,
    anchored_target,
    guided_target,
    moved_target,
)
from expunge.train.predictions import Networks
from guarded import draw

generator = torch.Generator().manual_seed(0)
e0, ep = torch.randn(2, 3, 4, 8, 8, generator=generator).unbind(0)
eh = torch.randn(3, 2, 4, 8, 8, generator=generator)
M = torch.rand(3, 2, 8, 8, generator=generator)
CONCEPT = Concept(targets=["a bomb", "a dagger"], preserve=["a key", ""])


def test_unseen_is_the_teachers_own_to_the_bit() -> None:
    assert torch.equal(guided_target(ep, e0, eh, torch.zeros_like(M), 3.0), ep)


def test_without_strength_everywhere_it_is_the_empty_prompts() -> None:
    torch.testing.assert_close(guided_target(ep, e0, eh, torch.ones_like(M), 0.0), e0)


@pytest.fixture
def made(tiny_sd1, tiny_clip):
    """A guide for a threshold, on a tiny model, and a batch."""
    pipeline = backbones.load_pipeline(tiny_sd1)
    names = backbones.modules_of(pipeline.unet, "x")
    adapter = adapters.attach(pipeline.unet, names, 2, 2, seed=0)
    networks = Networks(pipeline.unet, pipeline.unet, pipeline.scheduler, None, adapter)
    maker = Maker(networks, lambda p: condition(pipeline, p), "", (4, 8, 8))
    x_t, t = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([10, 300, 700])

    def build(η: float, **more):
        how = Density(density=ClipText(tiny_clip, threshold=η), **more)
        return how.guide(pipeline, CONCEPT, maker)

    build.pipeline = pipeline
    return build, {"teacher/concept": ep, "teacher/null": e0}, x_t, t, networks


def test_a_threshold_that_is_never_reached_leaves_the_teacher(made) -> None:
    build, predictions, x_t, t, networks = made
    assert torch.equal(build(1.0)(predictions, x_t, t), ep)
    assert networks.forwards["teacher"] == 0


def test_anchored_it_teaches_the_sentence_without_the_concept(made) -> None:
    """Unseen the anchor's own prediction, seen that and away from the concept's text."""
    build, predictions, x_t, t, _ = made
    ea = torch.randn(ep.shape, generator=generator)
    found = build(1.0, anchored=True)
    assert found.needs == ("teacher/concept", "teacher/null", "teacher/anchor")
    assert torch.equal(found(predictions | {"teacher/anchor": ea}, x_t, t), ea)
    told = {"places": 0, "strength": 2.0}
    seen = build(-1.0, anchored=True, **told)(predictions | {"teacher/anchor": ea}, x_t, t)
    plain = build(-1.0, **told)(predictions, x_t, t)
    # Everywhere, so that of the prompt's own guidance nothing is left in either.
    torch.testing.assert_close(seen - ea, plain - e0, atol=1e-4, rtol=1e-3)
    half = anchored_target(ea, e0, eh, M / 2, 3.0)
    torch.testing.assert_close(half, (ea + anchored_target(ea, e0, eh, M, 3.0)) / 2)


def test_what_is_seen_is_guided_by_its_own_text(made) -> None:
    """Both concepts seen, everywhere: ep − (ep − e0) − w Σ (e_h − e0)."""
    build, predictions, x_t, t, networks = made
    found = build(-1.0, places=0, strength=2.0)(predictions, x_t, t)
    assert networks.forwards["teacher"] == 6
    wanted = e0.clone()
    for text in CONCEPT.targets:
        with torch.no_grad():
            states = build(1.0).maker.embed([text] * 3).states
            wanted -= 2.0 * (networks.unet(x_t, t, states).sample - e0)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert not found.requires_grad
    somewhere = build(-1.0, places=2, strength=2.0)(predictions, x_t, t)
    assert not torch.allclose(somewhere, found)


@pytest.mark.parametrize("places", [0, 2])
def test_under_guidance_it_is_what_the_guard_does(made, tiny_clip, places) -> None:
    """ε* of the guard's own x_t and predictions, where it sees one concept, both, or none."""
    build, _, _, _, _ = made
    s, told = 3.0, {"places": places, "strength": 1.5, "guidance_scale": 3.0}

    def guards(η: float):
        density = ClipText(tiny_clip, threshold=η).build(CONCEPT)
        how = Correction(strength=1.5, places=places, start=0.0)
        guarded = guard(build.pipeline, density, how=how)
        worker, found = guarded._guard, {}
        correction = worker.correction

        def spy(scheduler, output, t, x_t):
            Δ = correction(scheduler, output, t, x_t)
            e_p, e_0, _ = worker.branch.pair()
            predictions = {"teacher/concept": e_p, "teacher/null": e_0}
            found["asked"] = predictions, x_t, t.expand(len(x_t))
            found["said"] = output + level(scheduler, t).slope * Δ
            found["seen"] = worker.seen

        worker.correction = spy
        draw(guarded, num_inference_steps=1, guidance_scale=s)
        return found

    asked = guards(-1.0)["asked"]
    guide_ = build(-1.0, **told)
    images, _ = guide_.sight(*asked)
    with torch.no_grad():
        scores = guide_.density(images).per_concept.flatten().sort().values
    η = float(scores[2:4].mean())
    found = guards(η)
    assert sorted(found["seen"].sum(1).tolist()) == [0, 1, 2]
    learnt = build(η, **told)(*found["asked"])
    e_0 = found["asked"][0]["teacher/null"]
    torch.testing.assert_close(guide(e_0, learnt, s), found["said"], atol=1e-4, rtol=1e-4)


def test_prompts_are_the_concepts_alone_or_beside_what_stays() -> None:
    rng = random.Random(0)
    drawn = {Density(pairs=0.5).prompts(CONCEPT, rng) for _ in range(100)}
    assert all(made == learnt for made, learnt in drawn)
    assert {made for made, _ in drawn} == {
        "a bomb", "a dagger", "a bomb and a key", "a key and a bomb", "a dagger and a key",
        "a key and a dagger",
    }  # fmt: skip
    alone = replace(Density(), pairs=0.0)
    assert {alone.prompts(CONCEPT, rng)[0] for _ in range(50)} == {"a bomb", "a dagger"}


def test_down_the_gradient_the_clean_picture_under_guidance_is_the_moved_one() -> None:
    s, ᾱ, x_t = 4.0, torch.tensor([0.9, 0.5, 0.1]), torch.randn(ep.shape, generator=generator)
    Δ = torch.randn(ep.shape, generator=generator)
    found = to_x0(guide(e0, moved_target(ep, Δ, ᾱ, s), s), x_t, ᾱ)
    torch.testing.assert_close(found, to_x0(guide(e0, ep, s), x_t, ᾱ) + Δ, atol=1e-4, rtol=1e-4)


def test_the_gradient_lowers_the_density_where_it_is_seen(made) -> None:
    build, predictions, x_t, t, networks = made
    assert torch.equal(build(1.0, direction="gradient")(predictions, x_t, t), ep)
    guide_ = build(-1.0, direction="gradient", strength=0.05)
    target = guide_(predictions, x_t, t)
    assert networks.forwards["teacher"] == 0
    ᾱ = alpha_bar(networks.scheduler, t)

    def seen(e: torch.Tensor) -> torch.Tensor:
        x0 = to_x0(guide(e0, e, 4.0), x_t, ᾱ)
        return guide_.density(guide_.sight.look(x0)).score

    with torch.no_grad():
        before, after = seen(ep), seen(target)
    assert (after[before > 0] < before[before > 0]).all()
    # Where log p_h has no gradient nothing is moved.
    assert torch.equal(target[before <= 0], ep[before <= 0])
    assert (before > 0).any()


@pytest.mark.parametrize("bad", [{"strength": -1.0}, {"pairs": 2.0}, {"places": 99}, {"copies": 0}])
def test_what_cannot_be_is_refused(bad) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Density(**bad)
