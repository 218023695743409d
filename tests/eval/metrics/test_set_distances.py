"""FID, KID and CMMD: closed forms, torch-fidelity, a double loop, and what holds for all three."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expunge.errors import UserError
from expunge.eval.features.clip import ClipFeatures
from expunge.eval.features.emoji_judge import EmojiJudgeFeatures
from expunge.eval.metrics import Batch
from expunge.eval.metrics.cmmd import Cmmd
from expunge.eval.metrics.discrepancy import gaussian as gaussian_kernel
from expunge.eval.metrics.discrepancy import mmd2, polynomial
from expunge.eval.metrics.frechet import Frechet, Gaussian, frechet
from expunge.eval.metrics.jackknife import jackknife_interval
from expunge.eval.metrics.kid import Kid
from expunge.pictures import save_png, to_pil
from picture_metrics import Pixels, as_pictures, cases_of, gaussian, measured


def test_frechet_of_gaussians_is_its_closed_form() -> None:
    """Of moments that do not commute, against the square root that is known."""
    rng = np.random.default_rng(3)
    Q = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    roots, μ = rng.uniform(0.1, 2, 5), rng.standard_normal(5)
    # Of independent directions: Σ (s_i − t_i)² + ‖δ‖².
    A, B = (Q * roots**2) @ Q.T, (Q * (roots + 0.5) ** 2) @ Q.T
    found = frechet(Gaussian(μ, A), Gaussian(μ + 0.3, B))
    assert found == pytest.approx(5 * 0.3**2 + 5 * 0.5**2, rel=1e-9)
    # Of any 2 × 2 matrices: tr (Σ₁Σ₂)^½ = √(tr Σ₁Σ₂ + 2 √det Σ₁Σ₂).
    A, B = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    root = np.sqrt(np.trace(A @ B) + 2 * np.sqrt(np.linalg.det(A @ B)))
    found = frechet(Gaussian(np.zeros(2), A), Gaussian(np.zeros(2), B))
    assert found == pytest.approx(np.trace(A) + np.trace(B) - 2 * root, rel=1e-12)


def test_fid_of_samples_nears_the_distance_of_their_distributions() -> None:
    X, Y = gaussian(20_000, 4, seed=1), gaussian(20_000, 4, 0.5, 2.0, seed=2)
    found = frechet(Gaussian.of(X), Gaussian.of(Y))
    assert found == pytest.approx(4 * 0.5**2 + 4 * 1.0**2, rel=0.03)


@pytest.mark.parametrize(("n", "m", "D"), [(60, 60, 8), (300, 200, 40), (20, 30, 24)])
def test_fid_is_torch_fidelitys(n: int, m: int, D: int) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    X, Y = gaussian(n, D, seed=1), gaussian(m, D, 0.4, 1.3, seed=2) @ gaussian(D, D, seed=3)
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(torch.from_numpy(F)) for F in (X, Y)), False
    )
    ours = frechet(Gaussian.of(X), Gaussian.of(Y))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


@pytest.mark.parametrize("kernel", ["poly", "rbf"])
def test_kid_is_torch_fidelitys(kernel: str) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    X, Y = gaussian(50, 12, seed=1), gaussian(50, 12, 0.3, 1.2, seed=2)
    theirs = kid_features_to_metric(
        torch.from_numpy(X), torch.from_numpy(Y), kid_subsets=1, kid_subset_size=50,
        kid_kernel=kernel, kid_kernel_rbf_sigma=3.0, verbose=False,
    )  # fmt: skip
    k = polynomial if kernel == "poly" else gaussian_kernel(3.0)
    value, _ = mmd2(X, Y, k, np.zeros(50, int), paired=False) or (0, [])
    assert value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("paired", [False, True])
def test_mmd_is_a_double_loop_whole_and_without_each_fold(estimator: Any, paired: bool) -> None:
    n, m = 9, 9 if paired else 7
    X, Y = gaussian(n, 3, seed=1), gaussian(m, 3, 0.5, seed=2)
    folds = np.array([0, 0, 1, 1, 1, 2, 2, 3, 3])

    def k(x: Any, y: Any) -> float:
        return float(np.exp(-((x - y) ** 2).sum() / (2 * 1.5**2)))

    def loop(rows: list[int], others: list[int]) -> float:
        distinct = estimator == "unbiased"
        xx = [k(X[i], X[j]) for i in rows for j in rows if not distinct or i != j]
        yy = [k(Y[i], Y[j]) for i in others for j in others if not distinct or i != j]
        apart = distinct and paired
        xy = [k(X[i], Y[j]) for i in rows for j in others if not apart or i != j]
        return float(np.mean(xx) + np.mean(yy) - 2 * np.mean(xy))

    found = mmd2(X, Y, gaussian_kernel(1.5), folds, paired=paired, estimator=estimator)
    assert found is not None
    assert found[0] == pytest.approx(loop(list(range(n)), list(range(m))), rel=1e-10)
    for g, value in enumerate(found[1]):
        rows = [i for i in range(n) if folds[i] != g]
        others = rows if paired else list(range(m))
        assert value == pytest.approx(loop(rows, others), rel=1e-10)
    assert len(found[1]) == 4


def test_mmd_of_more_rows_than_a_block_is_the_same() -> None:
    X, Y = gaussian(2500, 2, seed=1), gaussian(1100, 2, 0.2, seed=2)
    K = [polynomial(A, B) for A, B in ((X, X), (Y, Y), (X, Y))]
    want = K[0].mean() + K[1].mean() - 2 * K[2].mean()
    found = mmd2(X, Y, polynomial, np.arange(2500) % 5, paired=False, estimator="biased")
    assert found is not None
    assert found[0] == pytest.approx(want, rel=1e-9)


def test_kid_is_unbiased() -> None:
    """Of N(0, 1) and N(δ, 1) with k = (xy + 1)³, whose discrepancy has a closed form."""
    δ = 0.5
    # E k(x, x′) by moments of independent normals: 1 + 3 a₁ b₁ + 3 a₂ b₂ + a₃ b₃.
    moments = {0.0: np.array([0, 1, 0]), δ: np.array([δ, 1 + δ**2, 3 * δ + δ**3])}

    def mean(a: float, b: float) -> float:
        return 1 + float(np.sum(np.array([3, 3, 1]) * moments[a] * moments[b]))

    true = mean(0.0, 0.0) + mean(δ, δ) - 2 * mean(0.0, δ)
    settings, cases = Kid(extractor=Pixels(1)), cases_of(30)
    values = [
        measured(
            settings,
            cases,
            as_pictures(gaussian(30, 1, seed=2 * seed)),
            as_pictures(gaussian(30, 1, δ, seed=2 * seed + 1)),
        ).value
        for seed in range(200)
    ]
    assert np.mean(values) == pytest.approx(true, abs=3 * np.std(values) / np.sqrt(200))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of N(0, I) and N(δ, I) in 8 dimensions and a Gaussian kernel."""
    D, δ, σ2 = 8, 0.5, 4.0
    near = (σ2 / (σ2 + 2)) ** (D / 2)
    true = 2 * near * (1 - np.exp(-D * δ**2 / (2 * (σ2 + 2))))
    held, kernel = 0, gaussian_kernel(np.sqrt(σ2))
    for seed in range(150):
        X, Y = gaussian(120, D, seed=2 * seed), gaussian(120, D, δ, seed=2 * seed + 1)
        value, without = mmd2(X, Y, kernel, np.arange(120) % 20, paired=True) or (0, [])
        low, high = jackknife_interval(value, without)
        held += low <= true <= high
    assert 135 <= held <= 149  # 95 % of 150 is 142.5, give or take 2.7


@pytest.mark.parametrize(
    "settings",
    [Frechet(extractor=Pixels(8)), Kid(extractor=Pixels(8)), Cmmd(extractor=Pixels(8))],
    ids=["fid", "kid", "cmmd"],
)
class TestEverySetDistance:
    cases = cases_of(40, prompts=20)
    X = as_pictures(gaussian(40, 8, seed=1))
    Y = as_pictures(gaussian(40, 8, 0.5, 1.5, seed=2))

    def test_equal_pictures_are_at_no_distance(self, settings: Any) -> None:
        found = measured(settings, self.cases, self.X, self.X)
        assert (found.value, found.n) == (pytest.approx(0, abs=1e-9), 40)
        assert found.low == pytest.approx(0, abs=1e-9)
        assert not found.higher_is_better
        assert found.unit == "number"

    def test_order_and_batches_do_not_matter_to_the_bit(self, settings: Any) -> None:
        whole = measured(settings, self.cases, self.X, self.Y)
        order = np.random.default_rng(0).permutation(40)
        tally = settings.open()
        for part in np.split(order, [1, 7, 30]):
            batch = tuple(self.cases[i] for i in part)
            tally.update(Batch(batch, self.X[part], self.Y[part]))
        assert tally.compute() == whole
        assert whole.value > 0
        assert whole.low < whole.value < whole.high

    def test_an_update_that_fails_changes_nothing(self, settings: Any) -> None:
        tally = settings.open()
        tally.update(Batch(tuple(self.cases), self.X, self.Y))
        before = tally.compute()
        broken = self.Y.clone()
        broken[3, 0, 0, 0] = float("nan")
        with pytest.raises(FloatingPointError, match="NaN"):
            tally.update(Batch(tuple(self.cases), self.X, broken))
        with pytest.raises(ValueError, match="of 40"):
            tally.update(Batch(tuple(self.cases), self.X, self.Y[:5]))
        assert tally.compute() == before

    def test_the_base_itself_has_no_distance_to_the_base(self, settings: Any) -> None:
        found = measured(settings, self.cases, self.X)
        assert (found.value, found.low, found.high, found.n) == (None, None, None, 0)

    def test_to_a_folder(self, settings: Any, tmp_path: Path) -> None:
        for i, picture in enumerate(self.Y.clamp(-1, 1)):
            save_png(to_pil(picture), tmp_path / f"{i:02}.png")
        there = replace(settings, reference=tmp_path)
        tally = there.open()
        tally.update(Batch(tuple(self.cases), self.X, None))
        found, told = tally.compute(), tally.protocol()["reference"]
        bytes_again = ((self.Y.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        folds = np.array([i % 20 for i in range(40)])
        want = settings.distance(
            self.X.flatten(1)[:, :8].double().numpy(),
            bytes_again.flatten(1)[:, :8].double().numpy(), folds, False,
        )[0]  # fmt: skip
        assert found.value == pytest.approx(want, rel=1e-5)
        assert told["pictures"] == 40
        save_png(to_pil(-self.Y[0].clamp(-1, 1)), tmp_path / "00.png")
        assert there.open().protocol()["reference"]["sha256"] != told["sha256"]

    def test_an_empty_folder_is_one_line(self, settings: Any, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no picture"):
            replace(settings, reference=tmp_path).open()

    def test_more_noise_is_farther(self, settings: Any, emoji: Any, spoiled: Any) -> None:
        # Turned and moved, so that there are more pictures than features.
        def more(images: torch.Tensor) -> torch.Tensor:
            return torch.cat([
                images.roll(shift, 3).flip(dims)
                for shift, dims in itertools.product((0, 4, 8), ([], [3]))
            ])  # fmt: skip

        cases = [replace(case, seed=10 * case.seed + i) for i in range(6) for case in emoji[0]]
        ours = replace(settings, extractor=EmojiJudgeFeatures())
        values = [
            measured(ours, cases, more(spoiled(s)), more(emoji[1])).value for s in (0, 0.1, 0.3, 1)
        ]
        assert values[0] == pytest.approx(0, abs=1e-6)
        assert values == sorted(values)
        assert values[3] > 1.5 * values[2] > 1.5 * 1.5 * values[1] > 0


def test_fid_without_more_pictures_than_features_is_no_number() -> None:
    X = as_pictures(gaussian(8, 8))
    found = measured(Frechet(extractor=Pixels(8)), cases_of(8), X, X + 1)
    assert (found.value, found.low, found.n) == (None, None, 8)
    assert measured(Frechet(extractor=Pixels(7)), cases_of(8), X, X + 1).value is not None
    # Without the first of two prompts a single picture is left, which has no covariance.
    found = measured(Frechet(extractor=Pixels(2)), cases_of(3, prompts=2), X[:3], X[3:6])
    assert found.value is not None
    assert (found.low, found.high) == (None, None)


def test_one_picture_has_no_discrepancy_and_one_fold_no_interval() -> None:
    X = as_pictures(gaussian(3, 2))
    assert measured(Kid(extractor=Pixels(2)), cases_of(1), X[:1], X[1:2]).value is None
    found = measured(Kid(extractor=Pixels(2)), cases_of(2), X[:2], X[1:])
    assert found.value is not None
    assert found.low is None


def test_cmmd_is_a_thousand_times_the_paper_on_clips_vectors(tiny_clip: str) -> None:
    from expunge.clip import load_clip

    images = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    base = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    settings = Cmmd(extractor=ClipFeatures(clip=tiny_clip, device="cpu"), estimator="biased")
    found = measured(settings, cases_of(7), images, base)
    X, Y = (load_clip(tiny_clip).encode_images(x).detach().double() for x in (images, base))
    sums = [
        sum(float(torch.exp(-((a - b) ** 2).sum() / 200)) for a in A for b in B)
        for A, B in ((X, X), (Y, Y), (X, Y))
    ]
    assert found.value == pytest.approx(1000 * (sums[0] + sums[1] - 2 * sums[2]) / 49, rel=1e-4)
    told = settings.open().protocol()
    assert told["formula"] == "1000 x biased MMD², Gaussian kernel, sigma 10"
    assert told["features"]["clips"] == [load_clip(tiny_clip).eye]
