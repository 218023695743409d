"""A few latents that stand for all: the algebra, and that the choice beats chance."""

import pytest
import torch

from expunge import adapters, backbones
from expunge.conditioning import condition
from expunge.train.coreset import changes, choose, gram, non_negative
from expunge.train.predictions import Inputs, Networks


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_distances_of_grams_are_those_of_the_quadratic_forms() -> None:
    D = draw(2, 3, 4, 2, 2)
    flat = D.flatten(2)
    G = flat @ flat.mT / 16
    one, other = gram(D)
    assert (one - other).norm().item() == pytest.approx((G[0] - G[1]).norm().item(), rel=1e-5)
    a = draw(3, seed=1)  # ‖Σ a_k d_k‖² is linear in the features
    value = (torch.einsum("k,kchw->chw", a, D[0])).square().mean()
    k, m = torch.triu_indices(3, 3)
    weight = a[k] * a[m] * torch.where(k == m, 1.0, 2.0**0.5)
    assert (weight * one).sum().item() == pytest.approx(value.item(), rel=1e-5)


def test_non_negative_least_squares_meets_its_conditions() -> None:
    A, b = draw(6, 4).double(), draw(6, seed=1).double()
    w = non_negative(A, b, 5000)
    slope = A.T @ (A @ w - b)
    assert (w >= 0).all()
    assert (slope > -1e-6).all()
    assert (slope * w).abs().max() < 1e-6


def test_points_that_are_all_alike_need_one() -> None:
    w = choose(torch.ones(10, 3), 4)
    assert (w > 0).sum() == 1
    assert w.sum().item() == pytest.approx(1)


def test_where_nothing_changes_anything_will_do() -> None:
    w = choose(torch.zeros(5, 3), 2)
    assert torch.equal(w, torch.full((5,), 0.2))
    assert torch.multinomial(w, 3, replacement=True).shape == (3,)


def test_what_is_chosen_is_nearer_to_the_mean_than_chance() -> None:
    g = draw(200, 21).square() * torch.rand(200, 1, generator=torch.Generator().manual_seed(2))
    mean = g.mean(0)
    w = choose(g, 12)
    assert 1 <= (w > 0).sum() <= 12
    ours = ((w @ g) - mean).norm()
    generator = torch.Generator().manual_seed(3)
    chance = [
        (g[torch.randperm(200, generator=generator)[:12]].mean(0) - mean).norm() for _ in range(50)
    ]
    assert ours < min(chance)


def test_changes_are_of_the_networks_predictions_and_leave_it_as_it_was(tiny_sd1) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    names = backbones.modules_of(pipeline.unet, "x")
    parameters = adapters.attach(pipeline.unet, names, 2, 2, seed=0)
    networks = Networks(pipeline.unet, pipeline.unet, pipeline.scheduler, None, parameters)
    inputs = Inputs(
        draw(5, 4, 8, 8), torch.tensor([1, 50, 300, 700, 999]), condition(pipeline, ["a"] * 5)
    )
    before = networks.epsilon("student_sg", inputs)
    found = changes(networks, inputs, 3, torch.Generator().manual_seed(0))
    assert found.shape == (5, 3, 4, 8, 8)
    assert (found.flatten(2).abs().amax(2) > 0).all()
    assert networks.forwards["sampling"] == 5 * 4
    assert torch.equal(networks.epsilon("student_sg", inputs), before)
    assert all(not p.any() for n, p in pipeline.unet.named_parameters() if "lora_B" in n)
    again = changes(networks, inputs, 3, torch.Generator().manual_seed(0))
    assert torch.equal(again, found)
