"""Negative classifier guidance, with densities and decoders whose gradient is known."""

import pytest
import torch
from torch import Tensor

from expunge import backbones, prediction
from expunge.densities.base import HarmDensity
from expunge.sampling.denoiser_hook import Guidance, guide_denoiser
from expunge.sampling.samplers.classifier import classifier_guidance, harm_gradient

PROMPTS, SEEDS = ["a bomb", "a cat face", "a key"], [1, 2, 3]


class Brightness(HarmDensity):
    """How bright a picture is, from 0 to 1."""

    names = ("light",)

    def __init__(self, η: float = 0.5) -> None:
        self.thresholds = torch.tensor([η])

    def per_concept(self, images: Tensor) -> Tensor:
        return torch.sigmoid(images.mean((1, 2, 3)))[:, None]


def decode(latents: Tensor) -> Tensor:
    """Pictures of which the first three channels are the latents'."""
    return torch.tanh(latents[:, :3].float())


def draw(pipeline, prompts=PROMPTS, seeds=SEEDS, **more):
    more = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"} | more
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(prompts, generator=generators, **more).images


@pytest.fixture(params=["tiny_sd1", "tiny_sd2"])
def pipeline(request):
    return backbones.load_pipeline(request.getfixturevalue(request.param))


def test_it_darkens_what_is_too_bright(pipeline) -> None:
    density = Brightness()
    plain = density(decode(draw(pipeline))).score
    found = density(decode(draw(classifier_guidance(pipeline, density, decode, 30.0)))).score
    assert (found < plain - 0.005).all()
    other = density(decode(draw(classifier_guidance(pipeline, density, decode, 60.0)))).score
    assert (other < found).all()


def test_it_is_the_published_formula(pipeline) -> None:
    """ε' = ε + √(1−ᾱ) γ ∇ log p_h, with the gradient of finite differences."""
    density, checked = Brightness(), []

    def log_p(call, x_t):
        e0, ep = call.pair(x_t, torch.arange(len(x_t)))
        x0 = prediction.to_x0(prediction.guide(e0, ep, call.s), x_t, call.ᾱ)
        return torch.sigmoid(decode(x0).mean((1, 2, 3))).log()

    def guided(call):
        g = harm_gradient(call, torch.arange(3), density, decode)
        ε = call.plain + (1 - call.ᾱ).sqrt().view(3, 1, 1, 1) * 7.0 * g
        direction = torch.randn(g.shape, generator=torch.Generator().manual_seed(0))
        ahead, behind = (log_p(call, call.x_t + h * direction) for h in (0.01, -0.01))
        slope, wanted = (ahead - behind) / 0.02, (g * direction).flatten(1).sum(1)
        torch.testing.assert_close(slope, wanted, atol=1e-4, rtol=2e-2)
        checked.append(wanted.abs().min())
        return ε

    by_hand = draw(guide_denoiser(pipeline, lambda pipe, arguments: Guidance(guided=guided)))
    assert len(checked) == 4
    assert min(checked) > 1e-4
    assert torch.equal(by_hand, draw(classifier_guidance(pipeline, density, decode, 7.0)))


def test_no_strength_changes_no_bit(pipeline) -> None:
    guarded = classifier_guidance(pipeline, Brightness(), decode, 0.0)
    assert torch.equal(draw(guarded), draw(pipeline))


def test_the_gate_leaves_alone_what_does_not_fire(pipeline) -> None:
    plain = draw(pipeline)
    never = classifier_guidance(pipeline, Brightness(η=1.1), decode, 30.0, gate=True)
    assert torch.equal(draw(never), plain)
    always = classifier_guidance(pipeline, Brightness(η=0.0), decode, 30.0, gate=True)
    ungated = classifier_guidance(pipeline, Brightness(), decode, 30.0)
    assert torch.equal(draw(always), draw(ungated))


def test_where_nothing_is_seen_there_is_no_gradient(pipeline) -> None:
    class Cosine(Brightness):
        def per_concept(self, images: Tensor) -> Tensor:
            return -torch.ones(len(images), 1)

    guarded = classifier_guidance(pipeline, Cosine(), decode, 30.0)
    assert torch.equal(draw(guarded), draw(pipeline))


def test_nan_is_an_error(pipeline) -> None:
    class Broken(Brightness):
        def per_concept(self, images: Tensor) -> Tensor:
            return images.mean((1, 2, 3))[:, None] * float("nan")

    with pytest.raises(FloatingPointError, match="NaN"):
        draw(classifier_guidance(pipeline, Broken(), decode))


def test_a_sample_does_not_depend_on_its_batch(pipeline) -> None:
    guarded = classifier_guidance(pipeline, Brightness(η=0.5), decode, 10.0, gate=True)
    together = draw(guarded)
    for i in range(3):
        alone = draw(guarded, PROMPTS[i : i + 1], SEEDS[i : i + 1])
        assert (together[i] - alone[0]).abs().max() < 1e-3
