"""The maths of guidance by texts, against independent computations in float64."""

import numpy as np
import pytest
import torch

from expunge.prediction import guide
from expunge.sampling.text_guidance import (
    SLD_PRESETS,
    SldStrength,
    away,
    conditional_half,
    negative,
    sld,
)

generator = torch.Generator().manual_seed(0)
# Twelve steps of three samples; small differences, so that μ is neither always 0 nor always 1.
E0, EP, EH = 0.01 * torch.randn(3, 12, 3, 4, 5, 5, generator=generator)
S = 7.5


def run_sld(how: SldStrength, rows=slice(None)) -> list[torch.Tensor]:
    ν, found = torch.zeros_like(E0[0, rows]), []
    for i in range(12):
        ε, ν = sld(E0[i, rows], EP[i, rows], EH[i, rows], S, ν, i, how)
        found.append(ε)
    return found


def by_hand(e0, ep, eh, δ, s_S, λ, s_m, β) -> list[np.ndarray]:
    """The paper's equations, element by element, in Python's own floats."""
    ν = np.zeros(e0[0].size)
    steps = []
    for i in range(len(e0)):
        ε = np.empty(e0[i].size)
        for k, (n, p, h) in enumerate(zip(e0[i].flat, ep[i].flat, eh[i].flat, strict=True)):
            μ = min(s_S * abs(p - h), 1.0) if p - h < λ else 0.0
            γ = μ * (h - n) + s_m * ν[k]
            ν[k] = β * ν[k] + (1 - β) * γ
            ε[k] = n + S * ((p - n) - (γ if i >= δ else 0.0))
        steps.append(ε.reshape(e0[i].shape))
    return steps


@pytest.mark.parametrize("preset", SLD_PRESETS)
def test_sld_is_the_papers_equations(preset) -> None:
    how = SLD_PRESETS[preset]
    wanted = by_hand(
        *(e.double().numpy() for e in (E0, EP, EH)),
        how.warmup,
        how.scale,
        how.threshold,
        how.momentum_scale,
        how.momentum,
    )
    for i, (ε, exact) in enumerate(zip(run_sld(how), wanted, strict=True)):
        np.testing.assert_allclose(ε.double().numpy(), exact, atol=1e-6, err_msg=f"step {i}")


def test_the_presets_are_the_published_ones() -> None:
    assert {
        name: (p.warmup, p.scale, p.threshold, p.momentum_scale, p.momentum)
        for name, p in SLD_PRESETS.items()
    } == {
        "weak": (15, 20, 0.0, 0.0, 0.0),
        "medium": (10, 1000, 0.01, 0.3, 0.4),
        "strong": (7, 2000, 0.025, 0.5, 0.7),
        "max": (0, 5000, 1.0, 0.5, 0.7),
    }


def test_momentum_gathers_while_it_warms_up() -> None:
    how = SldStrength(warmup=6, scale=1000.0, threshold=0.01, momentum_scale=0.5, momentum=0.7)
    found = run_sld(how)
    for i in range(6):
        assert torch.equal(found[i], guide(E0[i], EP[i], S))
    fresh, _ = sld(E0[6], EP[6], EH[6], S, torch.zeros_like(E0[6]), 6, how)
    assert (found[6] - fresh).abs().max() > 1e-3


def test_the_threshold_looks_at_the_sign() -> None:
    e0, ep = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.5, -0.5]]]])
    how = SldStrength(0, 1000.0, 0.1, 0.0, 0.0)
    ε, _ = sld(e0, ep, torch.full_like(ep, 0.2), S, torch.zeros_like(e0), 0, how)
    # ep − eh is 0.3, above λ: plain; and −0.7, below it: guided in full, g = eh.
    torch.testing.assert_close(ε, S * torch.tensor([[[[0.5, -0.5 - 0.2]]]]))


@pytest.mark.parametrize("preset", SLD_PRESETS)
def test_each_sample_has_its_own_momentum(preset) -> None:
    together = run_sld(SLD_PRESETS[preset])
    for row in range(3):
        alone = run_sld(SLD_PRESETS[preset], slice(row, row + 1))
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


def test_a_scale_of_zero_is_plain_guidance_to_the_bit() -> None:
    found = run_sld(SldStrength(0, 0.0, 1.0, 0.5, 0.7))
    assert all(torch.equal(ε, guide(e0, ep, S)) for ε, e0, ep in zip(found, E0, EP, strict=True))


def test_a_negative_prompt_is_one_weight_of_the_third_branch() -> None:
    e0, ep, eh = (e[0].double() for e in (E0, EP, EH))
    torch.testing.assert_close(negative(ep, eh, S), away(e0, ep, eh, S, (S - 1) / S))
    assert torch.equal(away(e0, ep, eh, S, 0.0), guide(e0, ep, S))


def test_the_pipelines_formula_gives_what_is_wanted() -> None:
    e0, ep, wanted = E0[0], EP[0], 3 * EH[0]
    half = conditional_half(e0, ep, wanted, S)
    torch.testing.assert_close(guide(e0, half, S), wanted, atol=1e-7, rtol=0)
    assert torch.equal(conditional_half(e0, ep, guide(e0, ep, S), S), ep)
