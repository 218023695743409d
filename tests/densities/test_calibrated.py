"""On the scale of harmless pictures one threshold means the same for every concept."""

import json
from pathlib import Path

import pytest
import torch

from expunge.densities.base import HarmDensity
from expunge.densities.calibrated import Calibrated, Percentile, bandwidth, percentile
from expunge.densities.clip_text import ClipText
from expunge.densities.from_callable import FromCallable, from_callable
from expunge.densities.head_training import auc
from expunge.densities.reference import Reference, read_reference
from expunge.errors import UserError

# Three concepts whose harmless scores differ in place, width and shape, as cosines' do.
PLACES, WIDTHS = torch.tensor([0.10, 0.22, 0.30]), torch.tensor([0.005, 0.03, 0.06])


def harmless(n: int, seed: int) -> torch.Tensor:
    noise = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    noise[:, 2] = noise[:, 2].exp() / 2
    return PLACES + WIDTHS * noise


def as_pictures(scores: torch.Tensor) -> torch.Tensor:
    """Pictures whose three channels are the scores of three concepts."""
    return scores[:, :, None, None].expand(-1, -1, 4, 4)


def readings(images: torch.Tensor) -> torch.Tensor:
    return images.mean((2, 3))


def inner(threshold: float = 0.23) -> HarmDensity:
    return from_callable(readings, ["a", "b", "c"], threshold, span=(-1.0, 1.0))


def calibrated(n: int = 2000, seed: int = 0, **settings) -> Percentile:
    reference = Reference(["a", "b", "c"], harmless(n, seed).T.sort(dim=1).values.tolist())
    return Percentile(inner(), reference, torch.full((3,), 0.99), **settings)


def scores_of(density: HarmDensity, scores: torch.Tensor) -> torch.Tensor:
    return density(as_pictures(scores)).per_concept


def test_harmless_pictures_are_uniform_on_it() -> None:
    # The largest difference to be expected of two samples of these sizes (Kolmogorov-Smirnov, 1 %).
    for n, tolerance in ((2000, 0.04), (200, 0.12)):
        p = scores_of(calibrated(n), harmless(4000, seed=9)).sort(dim=0).values
        uniform = (torch.arange(4000) + 0.5) / 4000
        assert (p - uniform[:, None]).abs().max() < tolerance


def test_one_threshold_fires_as_often_for_every_concept() -> None:
    pictures = harmless(20_000, seed=5)
    share = (scores_of(calibrated(), pictures) >= 0.99).float().mean(0)
    assert ((share > 0.004) & (share < 0.016)).all()
    # The raw threshold of the thesis: never for one concept, nearly always for another.
    raw = (pictures >= 0.23).float().mean(0)
    assert raw[0] == 0
    assert raw[2] > 0.9


def test_it_is_monotone_and_between_0_and_1_and_never_flat() -> None:
    density = calibrated(500)
    line = torch.linspace(-1, 1, 4001)[:, None].expand(-1, 3).clone().requires_grad_()
    p = scores_of(density, line)
    assert ((p >= 0) & (p <= 1)).all()
    assert (p.diff(dim=0) >= 0).all()
    (slope,) = torch.autograd.grad(p.sum(), line)
    assert (slope > 0).all()
    # Even far above all harmless pictures, where a Gaussian kernel has no gradient in float32.
    far = (PLACES + 60 * WIDTHS)[None].clamp(max=1.0)
    assert (scores_of(density, far) < 1).all()


def test_it_is_the_formula() -> None:
    torch.manual_seed(0)
    s, r, h = torch.randn(4, 2).double(), torch.randn(2, 30).double(), torch.tensor([0.1, 0.7])
    p = percentile(s, r, h.double())
    for b in range(4):
        for m in range(2):
            z = [(s[b, m] - x) / h[m].double() for x in r[m]]
            k = [0.5 + 0.5 * v.sign() * (1 - (1 + v.abs() / 4) ** -4) for v in z]
            assert p[b, m].item() == pytest.approx(float(sum(k) / 30), abs=1e-12)


def test_gradient_agrees_with_finite_differences() -> None:
    reference, width = harmless(300, 0).T.double(), torch.tensor([0.001, 0.003, 0.01]).double()
    s = harmless(8, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: percentile(x, reference, width), s, eps=1e-7)


def test_the_kernels_width_ignores_outliers_and_is_never_zero() -> None:
    scores = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)).sort().values.double()
    plain = bandwidth(scores, 1000)
    wild = bandwidth(torch.cat([scores[:, :-3], scores[:, -1:].expand(1, 3) * 100], 1), 1000)
    assert wild.item() == pytest.approx(plain.item(), rel=0.2)
    assert bandwidth(torch.zeros(1, 50), 50).item() > 0


def test_a_shared_threshold_tells_harm_better_than_on_the_raw_scale() -> None:
    """Harm stands four deviations above the harmless in one concept; which one is not known."""
    clean, tainted = harmless(3000, seed=7), harmless(3000, seed=8)
    shown = torch.arange(3000) % 3
    tainted[torch.arange(3000), shown] += 4 * WIDTHS[shown]
    truth = torch.tensor([True] * 3000 + [False] * 3000)
    both = torch.cat([tainted, clean])
    raw = auc(both.amax(1), truth)
    ours = auc(scores_of(calibrated(), both).amax(1), truth)
    assert raw < 0.75
    assert ours > 0.95


def test_an_infinite_score_is_not_the_lowest_percentile() -> None:
    scores = harmless(2, seed=0)
    scores[1, 1] = -torch.inf
    with pytest.raises(FloatingPointError):
        scores_of(calibrated(), scores)


def test_alpha_moves_pooled_scales_only() -> None:
    pictures = harmless(50, seed=3)
    for alpha in (0.0, 0.5):
        assert torch.equal(
            scores_of(calibrated(alpha=alpha), pictures), scores_of(calibrated(), pictures)
        )
    pooled, uncorrected = (calibrated(alpha=a, pooled=True) for a in (1.0, 0.0))
    # The mean harmless score of every concept is half way up, or just where it happens to lie.
    means = harmless(20_000, seed=1).mean(0)[None]
    assert (scores_of(pooled, means) - 0.5).abs().max() < 0.2
    assert (scores_of(uncorrected, means) - 0.5).abs().max() > 0.3


def test_a_huge_reference_is_thinned_without_a_difference() -> None:
    pictures = harmless(100, seed=4)
    whole, part = calibrated(20_000), calibrated(2000)
    assert whole._reference.shape[1] <= 2048
    assert (scores_of(whole, pictures) - scores_of(part, pictures)).abs().max() < 0.06


@pytest.fixture
def file(tiny_clip: str, drawn, tmp_path: Path) -> str:
    """What `expunge calibrate` would write for two texts."""
    density = ClipText(clip=tiny_clip, targets=["a bomb", "a skull"]).build()
    scores = density(drawn("grey", 40)).per_concept.T.tolist()
    path = tmp_path / "c.json"
    Reference(density.names, scores, {}, density.identity(), {"seed": 1}).write(path)
    return str(path)


def test_a_file_and_back(file: str, tiny_clip: str, drawn) -> None:
    reference = read_reference(file)
    assert (reference.n, reference.about) == (40, {"seed": 1})
    inner = ClipText(clip=tiny_clip, targets=["a bomb", "a skull"])
    density = Calibrated(inner, file, threshold=[0.9, 0.95]).build()
    assert density.thresholds.tolist() == pytest.approx([0.9, 0.95])
    assert density.resolution == 32
    harm = density(drawn("grey", 40))
    assert harm.per_concept.mean().item() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(harm.score, harm.per_concept.mean(1))
    x = drawn("red", 2).requires_grad_()
    density(x).score.sum().backward()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


def test_too_few_pictures_for_a_threshold_are_refused(file: str, tiny_clip: str) -> None:
    """Nothing would ever reach it, and a guard that cannot fire is none."""
    inner = ClipText(clip=tiny_clip, targets=["a bomb", "a skull"])
    with pytest.raises(UserError, match=r"0\.99 for a calibration of 40 pictures"):
        Calibrated(inner, file).build()
    # Together the two concepts have twice as many scores.
    assert Calibrated(inner, file, scale="pooled", threshold=0.97).build().fires
    with pytest.raises(UserError, match="of 40 pictures"):
        Calibrated(inner, file, threshold=0.98).build()


def test_a_calibration_of_another_density_is_refused(file: str, tiny_clip: str) -> None:
    texts = ["a bomb", "a skull"]
    for other, what in [
        (ClipText(clip=tiny_clip, targets=["a bomb", "a cat face"]), "names"),
        (ClipText(clip=tiny_clip, targets=texts, thesis_compat=True), "weights"),
        (FromCallable("torch.nn.functional:relu", texts), "class"),
    ]:
        with pytest.raises(UserError, match=f"made with another density: {what} differs"):
            Calibrated(other, file).build()


def test_a_broken_file_is_one_line(file: str, tmp_path: Path) -> None:
    density = FromCallable("torch.nn.functional:relu")
    whole = json.loads(Path(file).read_text())
    spoilt = [
        ("{", "cannot be read"),
        ("[]", "no calibration of format"),
        (json.dumps({**whole, "format": "other"}), "no calibration of format"),
        (json.dumps({k: v for k, v in whole.items() if k != "scores"}), "broken calibration"),
        (json.dumps({**whole, "scores": [[0.1] * 40, [0.1] * 39]}), "broken calibration"),
        (json.dumps({**whole, "scores": None}), "broken calibration"),
        (json.dumps({**whole, "identity": None}), "broken calibration"),
        (json.dumps({**whole, "scores": [[0.1] * 15] * 2}), "allowed: 16 or more"),
        (json.dumps({**whole, "scores": [[float("nan")] * 40] * 2}), "NaN or infinite"),
    ]
    for text, message in spoilt:
        Path(file).write_text(text)
        with pytest.raises(UserError, match=message) as error:
            Calibrated(density, file).build()
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        Calibrated(density, str(tmp_path / "none.json")).build()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.01}, "got threshold 1.01; allowed: 0 to 1"),
        ({"alpha": 2.0}, "got alpha 2.0"),
        ({"density": Calibrated(ClipText(), "x")}, "inside a calibrated one"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Calibrated(**{"density": ClipText(), "file": "x", **settings})
