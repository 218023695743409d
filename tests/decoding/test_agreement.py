"""The report on how far a density can trust a decoder."""

import json
import math

import pytest
import torch

from expunge import backbones
from expunge.decoding import Clip, Linear, Vae
from expunge.decoding.agreement import (
    count_flops,
    gradient_cosine,
    probe,
    rank_correlation,
    report,
)
from expunge.decoding.base import Decoder
from expunge.densities.base import HarmDensity


class Redness(HarmDensity):
    """How red a picture is."""

    names = ("red",)
    thresholds = torch.tensor([0.5])

    def per_concept(self, images: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(3 * (images[:, :1] - images[:, 1:2]).mean((2, 3)))


@pytest.fixture(scope="module")
def pipeline(tiny_sd1):
    return backbones.load_pipeline(tiny_sd1)


def latents(stages: int = 2, n: int = 6) -> torch.Tensor:
    return torch.randn(stages, n, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_vae_agrees_with_itself_exactly(pipeline) -> None:
    found = report({"vae": Vae().build(pipeline)}, Redness(), latents())["vae"]
    for row in (found, *found["stages"]):
        for name in ("rank_correlation", "gradient_cosine"):
            assert (row[name]["value"], row[name]["low"], row[name]["high"]) == (1, 1, 1)
            assert row[name]["unknown"] == 0
    assert found["rank_correlation"]["n"] == 6
    assert [row["rank_correlation"]["n"] for row in found["stages"]] == [6, 6]


def test_cheap_decoders_cost_less_and_are_compared(pipeline, distilled) -> None:
    path = str(distilled)
    decoders = {
        "vae": Vae().build(pipeline),
        "clip": Clip(path).build(pipeline),
        "linear": Linear(path).build(pipeline),
    }
    found = report(decoders, Redness(), latents())
    json.dumps(found, allow_nan=False)
    assert found["linear"]["flops"] < found["clip"]["flops"]
    assert found["linear"]["flops"] < found["vae"]["flops"]
    for row in found.values():
        # Twice for convolutions, a little more where there is attention.
        assert 2 <= row["flops_with_gradient"] / row["flops"] < 2.2
        assert -1 <= row["gradient_cosine"]["low"] <= row["gradient_cosine"]["high"] <= 1
    assert found["clip"]["gradient_cosine"]["value"] < 1


def test_a_function_is_a_density_and_batches_do_not_matter(pipeline) -> None:
    decoder = Vae().build(pipeline)
    by_one = probe(decoder, lambda x: Redness()(x).score, latents(), batch_size=1)
    together = probe(decoder, Redness(), latents(), batch_size=100)
    torch.testing.assert_close(by_one.scores, together.scores)
    # Float noise, of which small elements of a gradient have as much as large ones.
    noise = 1e-4 * by_one.gradients.abs().max().item()
    torch.testing.assert_close(by_one.gradients, together.gradients, rtol=1e-3, atol=noise)
    assert by_one.gradients.shape == (2, 6, 4 * 8 * 8)


def test_nan_is_an_error(pipeline) -> None:
    decoder = Vae().build(pipeline)
    with pytest.raises(FloatingPointError, match="NaN"):
        probe(decoder, lambda x: x.mean((1, 2, 3)) * float("nan"), latents())
    with pytest.raises(FloatingPointError, match="NaN"):
        # Finite scores whose gradient is not.
        probe(decoder, lambda x: (x.mean((1, 2, 3)) * 0).sqrt(), latents())


def test_flops_are_those_of_the_formula() -> None:
    decoder = Decoder(torch.nn.Conv2d(4, 3, 1), 4, 1)
    flops = count_flops(decoder, torch.zeros(4, 8, 8))
    assert flops.forward == 2 * 4 * 3 * 64
    assert flops.forward_and_backward == 2 * flops.forward
    meta = count_flops(decoder, torch.empty(4, 8, 8, device="meta"))
    assert meta == flops


def test_rank_correlation_is_spearmans() -> None:
    up = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert rank_correlation(up, up.exp()).value == 1
    assert rank_correlation(up, -up).value == -1
    # One swap of neighbours: 1 − 6 Σd² / (n (n² − 1)) = 1 − 6 · 2 / 120.
    swapped = torch.tensor([1.0, 3.0, 2.0, 4.0, 5.0])
    ρ = rank_correlation(up, swapped)
    assert ρ.value == pytest.approx(0.9)
    half = 1.959963984540054 * math.sqrt((1 + 0.81 / 2) / 2)
    assert ρ.low == pytest.approx(math.tanh(math.atanh(0.9) - half))
    assert ρ.high == pytest.approx(math.tanh(math.atanh(0.9) + half))
    # Ties share their mean rank: ranks 1.5, 1.5, 3 against 1, 2, 3.
    tied = rank_correlation(torch.tensor([7.0, 7.0, 9.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert tied.value == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert (tied.low, tied.high) == (-1, 1)
    assert rank_correlation(up, torch.zeros(5)).value is None


def test_gradient_cosine_has_a_mean_and_an_interval() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]).double()
    b = torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 0.0]]).double()
    found = gradient_cosine(a, b)
    assert (found.value, found.n, found.unknown) == (0.5, 2, 1)
    assert found.low == pytest.approx(0.5 - 1.959963984540054 * 0.5)
    assert found.high == 1
    assert gradient_cosine(a[2:], b[2:]).value is None
