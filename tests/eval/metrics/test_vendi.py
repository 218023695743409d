"""The Vendi score: its two ends, its definition, parts and interval."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import eigvalsh

from expunge.eval.features.emoji_judge import EmojiJudgeFeatures
from expunge.eval.metrics import Batch
from expunge.eval.metrics.vendi import Vendi, vendi
from picture_metrics import Pixels, as_pictures, cases_of, gaussian, measured


def test_orthogonal_pictures_count_each_and_equal_ones_once() -> None:
    assert vendi(3 * np.eye(7)) == pytest.approx(7)
    assert vendi(np.ones((7, 4))) == pytest.approx(1)
    assert vendi(np.repeat(np.eye(3), 5, 0)) == pytest.approx(3)


@pytest.mark.parametrize(("n", "D"), [(6, 20), (20, 6), (5, 5)])
def test_it_is_the_entropy_of_the_kernels_eigenvalues(n: int, D: int) -> None:
    X = gaussian(n, D)
    cosine = np.corrcoef(X) * 0
    for i in range(n):
        for j in range(n):
            cosine[i, j] = X[i] @ X[j] / (np.linalg.norm(X[i]) * np.linalg.norm(X[j]))
    λ = eigvalsh(cosine / n).clip(1e-300)
    assert vendi(X) == pytest.approx(np.exp(-(λ * np.log(λ)).sum()), rel=1e-9)


def test_the_score_of_parts_is_their_mean() -> None:
    X = np.concatenate([np.eye(4), np.ones((4, 4)), np.ones((1, 4))])
    cases = cases_of(4, group="a") + cases_of(4, group="b") + cases_of(1, group="c")
    images = as_pictures(X)
    by_group = measured(Vendi(extractor=Pixels(4)), cases, images)
    assert (by_group.value, by_group.n) == (pytest.approx((4 + 1) / 2), 9)
    assert by_group.higher_is_better
    together = measured(Vendi(extractor=Pixels(4), within="all"), cases, images)
    assert together.value == pytest.approx(vendi(X))
    # Prompt 0 has pictures e₁, 1 and 1 of the groups, prompts 1 to 3 have one e and 1.
    by_prompt = measured(Vendi(extractor=Pixels(4), within="prompt"), cases, images)
    scores = [
        vendi(np.stack([np.eye(4)[i], *[np.ones(4)] * (2 if i == 0 else 1)])) for i in range(4)
    ]
    assert by_prompt.value == pytest.approx(np.mean(scores))


def test_order_and_batches_do_not_matter_to_the_bit() -> None:
    X, cases = as_pictures(gaussian(30, 6)), cases_of(30, prompts=10)
    settings = Vendi(extractor=Pixels(6))
    whole, tally = measured(settings, cases, X), settings.open()
    for part in np.split(np.random.default_rng(0).permutation(30), [4, 20]):
        tally.update(Batch(tuple(cases[i] for i in part), X[part]))
    assert tally.compute() == whole
    assert whole.low < whole.value < whole.high


def test_an_update_that_fails_changes_nothing() -> None:
    tally, X = Vendi(extractor=Pixels(6)).open(), as_pictures(gaussian(5, 6))
    tally.update(Batch(tuple(cases_of(5)), X))
    before = tally.compute()
    for spoiled, says in ((X * float("nan"), "NaN"), (X * 0, "all zero")):
        with pytest.raises(FloatingPointError, match=says):
            tally.update(Batch(tuple(cases_of(5)), spoiled))
    assert tally.compute() == before


def test_fewer_kinds_of_pictures_are_less_diverse(emoji: Any) -> None:
    """Of the bundled model: the more prompts answered with the first one's pictures, the fewer."""
    cases, images = emoji
    settings = Vendi(extractor=EmojiJudgeFeatures())
    values = []
    for collapsed in range(6):
        rows = [i - i % 6 if 0 < i % 6 <= collapsed else i for i in range(len(cases))]
        values.append(measured(settings, cases, images[torch.tensor(rows)]).value)
    assert values == sorted(set(values), reverse=True)


def test_too_few_pictures_are_no_number() -> None:
    settings = Vendi(extractor=Pixels(2))
    assert settings.open().compute().value is None
    assert measured(settings, cases_of(1), as_pictures(np.ones((1, 2)))).value is None
    # Without either prompt a single picture is left, whose diversity is no news.
    found = measured(settings, cases_of(2), as_pictures(np.eye(2)))
    assert (found.value, found.low) == (pytest.approx(2), None)
