"""A guard that cannot act is an error, and a strict one withholds what it could not mend."""

import copy

import diffusers
import pytest
import torch

from expunge.concepts import Concept
from expunge.densities.clip_text import ClipText
from expunge.errors import UserError
from expunge.sampling.correction import Correction
from expunge.sampling.guard import guard
from expunge.sampling.samplers.classifier import Classifier
from guarded import GRADIENT, Brightness, draw, scores


def test_a_density_that_was_never_asked_is_an_error(pipeline) -> None:
    late = Correction(direction="gradient", start=0.9)
    with pytest.raises(RuntimeError, match="never asked in 4 steps"):
        draw(guard(pipeline, Brightness(0.0), how=late))


def test_a_guarded_scheduler_in_another_pipeline_is_an_error(pipeline) -> None:
    guarded = guard(pipeline, Brightness(0.0))
    draw(guarded)
    stranger = copy.copy(pipeline)
    stranger.scheduler = guarded.scheduler
    with pytest.raises(RuntimeError, match="outside of its guarded pipeline"):
        draw(stranger)


def test_a_picture_without_a_gradient_is_an_error(pipeline) -> None:
    class Flat(Brightness):
        def per_concept(self, images):
            return super().per_concept(images) * 0 + 1

    with pytest.raises(FloatingPointError, match="saturated"):
        draw(guard(pipeline, Flat(0.5), how=GRADIENT))


def test_nan_is_an_error_not_safe(pipeline) -> None:
    class Broken(Brightness):
        def per_concept(self, images):
            return super().per_concept(images) * float("nan")

    with pytest.raises(FloatingPointError, match="NaN"):
        draw(guard(pipeline, Broken(0.5), how=GRADIENT))


def test_the_guide_of_icons_does_not_guard_a_model_of_pictures(pipeline) -> None:
    density = ClipText(targets=["a bomb"]).build()
    guard(pipeline, density)
    unet, shrinks = pipeline.unet, 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    unet.register_to_config(sample_size=512 // shrinks)
    with pytest.raises(UserError, match="icons of 64 pixels, for a model of 512"):
        guard(pipeline, density)
    with pytest.raises(UserError, match="icons of 64 pixels, for a model of 512"):
        Classifier().wrap(pipeline, Concept(targets=["a bomb"]))


def test_a_scheduler_put_in_afterwards_is_refused(pipeline) -> None:
    guarded = guard(pipeline, Brightness(0.5))
    guarded.scheduler = copy.copy(pipeline.scheduler)
    with pytest.raises(UserError, match="put in after the guard"):
        draw(guarded)


def test_a_pipeline_that_never_asks_its_scheduler_is_an_error(pipeline) -> None:
    class Deaf(diffusers.StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            return None

    deaf = Deaf.from_pipe(pipeline) if hasattr(Deaf, "from_pipe") else Deaf(**pipeline.components)
    with pytest.raises(RuntimeError, match="unguarded"):
        guard(deaf, Brightness(0.5))("a bomb")


def test_strict_withholds_what_is_still_there(pipeline) -> None:
    idle = Correction(direction="gradient", strength=0.0)
    values = scores(draw(pipeline), Brightness(0.0))
    density = Brightness(float(values.sort().values[1:].mean()))
    guarded = guard(pipeline, density, how=idle, strict=True)
    images = draw(guarded)
    bad = values >= density.thresholds
    assert guarded.trace.withheld == bad.tolist()
    assert (images[bad] == 0).all()
    assert torch.equal(images[~bad], draw(pipeline)[~bad])


def test_strict_draws_again_before_it_withholds(pipeline) -> None:
    class Grudge(Brightness):
        """Dislikes whatever it is shown first at the end, then nothing."""

        def __init__(self):
            super().__init__(0.5)
            self.judged = 0

        def per_concept(self, images):
            return torch.full((len(images), 1), 1.0 if self.judged == 0 else 0.0)

    density = Grudge()
    guarded = guard(
        pipeline, density, how=Correction(direction="gradient", strength=0.0),
        strict=True, resample=2,
    )  # fmt: skip
    judge = guarded._guard.judge

    def once(images):
        found = judge(images)
        density.judged += 1
        return found

    guarded._guard.judge = once
    images = draw(guarded)
    assert density.judged == 2
    assert guarded.trace.withheld == [False] * 3
    assert not (images == 0).flatten(1).all(1).any()


@pytest.mark.parametrize(
    "bad",
    [{"strength": -1}, {"repeats": 0}, {"copies": 0}, {"momentum": 1.0}, {"start": 1.0},
     {"strength": float("nan")}, {"schedule": []}, {"schedule": [1.0, -1.0]},
     {"window": (0.7, 0.3)}, {"release": 1.1}, {"release": float("nan")}],
    ids=str,
)  # fmt: skip
def test_impossible_corrections_are_refused(bad) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Correction(**bad)


def test_a_text_for_every_concept(pipeline) -> None:
    class Unnamed(Brightness):
        texts = None

    with pytest.raises(UserError, match="got 0 texts for 1 concepts"):
        guard(pipeline, Unnamed(0.5))
    with pytest.raises(UserError, match="texts"):
        guard(pipeline, Brightness(0.5), texts=["a bomb", "a dagger"])
    with pytest.raises(UserError, match="resample without strict"):
        guard(pipeline, Brightness(0.5), resample=1)
