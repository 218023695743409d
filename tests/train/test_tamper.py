"""Δ on the layers that are fine-tuned: where it acts, how it learns, what it leaves alone."""

import copy

import pytest
import torch

from expunge import backbones
from expunge.concepts import Concept
from expunge.conditioning import condition
from expunge.train.noised import Noised
from expunge.train.predictions import Inputs, Networks
from expunge.train.tamper import Tamper, Tampering
from small_runs import small_run


@pytest.fixture(params=["tiny_sd1", "tiny_sdxl"])
def pipeline(request):
    return backbones.load_pipeline(request.getfixturevalue(request.param))


def tampering_of(pipeline, **how) -> Tampering:
    unet = pipeline.unet.requires_grad_(False)
    networks = Networks(unet, unet, pipeline.scheduler, None, [])
    names = backbones.modules_of(unet, "x")
    return Tampering(Tamper(**how), networks, names, seed=0)


def asked(pipeline, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, *backbones.latent_shape(pipeline), generator=generator)
    return x, torch.full((n,), 500)


def test_it_is_the_unet_whose_weights_are_moved(pipeline) -> None:
    x, t = asked(pipeline, 2)
    told = condition(pipeline, ["a bomb", "a key"])
    moved = copy.deepcopy(pipeline.unet)
    tampering = tampering_of(pipeline)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, Δ in zip(backbones.modules_of(moved, "x"), tampering.Δ, strict=True):
            layer = moved.get_submodule(name)
            for part, weight in zip(Δ, [layer.weight, layer.bias], strict=False):
                part += 0.1 * torch.randn(part.shape, generator=generator)
                weight += part
        clean = pipeline.unet(x, t, **told.arguments(x.dtype)).sample
        expected = moved(x, t, **told.arguments(x.dtype)).sample
        with tampering.applied():
            found = pipeline.unet(x, t, **told.arguments(x.dtype)).sample
        after = pipeline.unet(x, t, **told.arguments(x.dtype)).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, clean, atol=1e-3)
    assert torch.equal(after, clean)


def test_only_the_student_is_under_attack(pipeline) -> None:
    x, t = asked(pipeline, 2)
    inputs = Inputs(x, t, condition(pipeline, ["a bomb", "a key"]))
    tampering = tampering_of(pipeline)
    networks = tampering.networks
    networks.untampered = lambda: tampering.applied(False)
    clean = networks.raw("student_sg", inputs)
    with torch.no_grad():
        for Δ in tampering.Δ:
            Δ[0] += 0.1
    with tampering.applied():
        assert torch.equal(networks.raw("student_sg", inputs), clean)
        assert not torch.allclose(networks.raw("student", inputs), clean)


def test_the_attacker_learns_his_pictures_and_begins_anew(pipeline) -> None:
    x_0, _ = asked(pipeline, 4)

    def embed(prompts):
        return condition(pipeline, prompts)

    tampering = tampering_of(pipeline, restart=30, learning_rate=1e-2, pictures=2)
    told = embed(["a bomb"] * 4)
    before = {name: p.clone() for name, p in pipeline.unet.named_parameters()}

    def fit() -> float:
        with tampering.applied():
            return tampering.loss(x_0, told, torch.Generator().manual_seed(7)).item()

    fresh = fit()
    for step in range(30):
        tampering.advance(step, x_0, ["a bomb"], embed)
    learnt = fit()
    assert learnt < 0.98 * fresh  # of a tiny UNet of noise, whose attention moves little
    tampering.advance(30, x_0, ["a bomb"], embed)
    assert learnt < fit()  # one step of Adam from nothing
    for name, p in pipeline.unet.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


def test_gradient_checkpointing_changes_nothing(pipeline) -> None:
    x_0, _ = asked(pipeline, 4)
    learnt = []
    for checkpointing in (False, True):
        tampering = tampering_of(pipeline, pictures=2)
        if checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
            pipeline.unet.train()
        for step in range(2):
            tampering.advance(step, x_0, ["a bomb"], lambda told: condition(pipeline, told))
        learnt.append([part.detach().clone() for Δ in tampering.Δ for part in Δ])
    for plain, rerun in zip(*learnt, strict=True):
        torch.testing.assert_close(rerun, plain)


def test_a_step_in_so_many_is_under_attack(pipeline) -> None:
    tampering = tampering_of(pipeline, every=3)
    assert [step for step in range(9) if tampering.due(step)] == [2, 5, 8]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "latents of type noised"),
        ({"latents": Noised(), "compile": True}, "tamper with compile"),
    ],
)
def test_what_it_needs_is_said(tmp_path, changes, said) -> None:
    with pytest.raises(ValueError, match=said):
        small_run("esd", tmp_path, tamper=Tamper(), concept=Concept(targets=["a bomb"]), **changes)


@pytest.mark.parametrize(
    "how", [{"every": 0}, {"restart": 0}, {"pictures": 0}, {"learning_rate": 0.0}]
)
def test_settings_out_of_range_are_refused(how) -> None:
    with pytest.raises(ValueError, match=r"got tamper\."):
        Tamper(**how)
