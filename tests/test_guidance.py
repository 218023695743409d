"""The maths of guidance, against formulas computed on their own and finite differences."""

import math

import pytest
import torch

from expunge import guidance
from expunge.densities.base import HarmDensity
from expunge.densities.from_callable import from_callable


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def density(seed: int = 3):
    """σ(⟨v, x⟩) of pictures, smooth and neither flat nor saturated."""
    v = normal(3, 8, 8, seed=seed) / 8
    return from_callable(lambda x: (x.double() * v).sum((1, 2, 3)).sigmoid())


def test_the_gradient_is_that_of_finite_differences() -> None:
    p, x0 = density(), normal(2, 3, 8, 8).double()
    decode = torch.tanh
    g = guidance.gradient(x0, p, decode)
    step = 1e-3 * normal(2, 3, 8, 8, seed=5).double()
    rise = p(decode(x0 + step)).score.log() - p(decode(x0 - step)).score.log()
    torch.testing.assert_close((2 * step * g).sum((1, 2, 3)), rise, rtol=1e-3, atol=1e-6)


def test_a_sample_has_the_gradient_that_it_has_alone() -> None:
    p, x0 = density(), normal(3, 3, 8, 8)
    together = guidance.gradient(x0, p, torch.tanh, copies=2, seed=7)
    alone = guidance.gradient(x0[1:2], p, torch.tanh, copies=2, seed=7)
    torch.testing.assert_close(together[1:2], alone)


def test_copies_are_the_mean_of_altered_views() -> None:
    p, x0 = density(), normal(1, 3, 8, 8)
    each = []
    for i in range(3):
        x = x0.clone().requires_grad_()
        p(guidance.view(torch.tanh(x), 40 + i)).score.log().sum().backward()
        each.append(x.grad)
    mean = guidance.gradient(x0, p, torch.tanh, copies=3, seed=40)
    torch.testing.assert_close(mean, torch.stack(each).mean(0))
    assert not torch.allclose(each[0], each[1])


def test_a_view_is_decided_by_its_seed_and_stays_a_picture() -> None:
    x = normal(2, 3, 16, 16).tanh()
    assert torch.equal(guidance.view(x, 1), guidance.view(x, 1))
    assert not torch.equal(guidance.view(x, 1), guidance.view(x, 2))
    assert guidance.view(x, 1).shape == x.shape


def test_normalised_steps_have_the_size_of_the_reference() -> None:
    g, r = normal(3, 4, 8, 8), torch.tensor([0.5, 1.0, 2.0])
    Δ = guidance.normalised(g, 3.0, r)
    torch.testing.assert_close(guidance.rms(Δ), 3 * r)
    assert (Δ * g).sum() < 0
    tiny = guidance.normalised(1e-25 * g, 3.0, r)  # its squares are nothing in float32
    torch.testing.assert_close(tiny, Δ)
    assert (guidance.normalised(0 * g, 3.0, r) == 0).all()
    torch.testing.assert_close(guidance.published(g, 75.0), -75 * g)


def test_stages() -> None:
    window = (0.3, 0.7)
    at = [guidance.stage("window", p, window) for p in (0.0, 0.3, 0.69, 0.7)]
    assert at == [0, 1, 1, 0]
    assert guidance.stage("constant", 0.9, window) == 1
    assert guidance.stage("cosine", 0.0, window) == 1
    assert guidance.stage("cosine", 0.5, window) == pytest.approx(0.5)
    assert [guidance.stage([3.0, 2.0], p, window) for p in (0.0, 0.49, 0.5, 0.99)] == [3, 3, 2, 2]
    with pytest.raises(ValueError, match="got schedule 'sine'"):
        guidance.stage("sine", 0.0, window)


def test_a_low_pass_keeps_what_is_constant_and_takes_what_alternates() -> None:
    even = torch.ones(1, 2, 8, 8)
    torch.testing.assert_close(guidance.smooth(even, 1.5), even)
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert guidance.smooth(board.expand(1, 1, 8, 8), 1.5)[..., 2:6, 2:6].abs().max() < 0.05
    assert torch.equal(guidance.smooth(even, 0.0), even)


class Corner(HarmDensity):
    """How red the upper left quarter is."""

    names, thresholds = ("red",), torch.zeros(1)

    def per_concept(self, images: torch.Tensor) -> torch.Tensor:
        half = images.shape[-1] // 2
        return images[:, :1, :half, :half].mean((2, 3)).sigmoid()


def test_a_concept_is_where_covering_it_lowers_the_density() -> None:
    images = -torch.ones(2, 3, 32, 32)
    images[:, 0, :16, :16] = 1
    images[:, 0, 20:, 20:] = 1  # red as well, but not what is looked for
    M = guidance.whereabouts(images, Corner(), torch.tensor([0, 0]), 4)
    assert M.shape == (2, 1, 32, 32)
    assert M[..., 2:12, 2:12].min() > 0.8
    assert M[..., 22:, 22:].max() == 0
    torch.testing.assert_close(M[0], M[1])
    nowhere = guidance.whereabouts(torch.zeros(1, 3, 32, 32), Corner(), torch.tensor([0]), 4)
    assert (nowhere == 1).all()


def test_root_mean_square() -> None:
    x = normal(2, 4, 8, 8)
    torch.testing.assert_close(guidance.rms(x), x.square().mean((1, 2, 3)).sqrt())
    assert math.isclose(guidance.rms(torch.full((1, 1, 2, 2), 3e-30)).item(), 3e-30, rel_tol=1e-5)
