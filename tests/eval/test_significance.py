"""Intervals and tests against scipy, statsmodels, closed forms and simulation."""

import itertools
import tracemalloc

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from expunge.eval import significance
from expunge.eval.significance import (
    clustered_wilson,
    compare_answers,
    compare_numbers,
    compare_shares,
    holm,
    mcnemar,
    mean_interval,
    over_seeds,
    paired_interval,
    pareto,
    ratio_of_answers,
    ratio_of_numbers,
    sign_flip,
    worth,
)
from expunge.results import wilson


@pytest.mark.parametrize(("k", "n"), [(0, 50), (1, 50), (16, 50), (50, 50), (0, 142), (108, 142)])
def test_wilson_is_that_of_statsmodels(k: int, n: int) -> None:
    assert wilson(k, n) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-12)


@pytest.mark.parametrize(("won", "lost", "same"), [(0, 0, 5), (3, 10, 20), (7, 7, 0), (0, 12, 1)])
def test_mcnemar_is_that_of_statsmodels(won: int, lost: int, same: int) -> None:
    a = [False] * won + [True] * lost + [True] * same
    b = [True] * won + [False] * lost + [True] * same
    if won + lost:
        table = [[same, lost], [won, 0]]
        assert mcnemar(a, b) == pytest.approx(reference_mcnemar(table, exact=True).pvalue)
    else:
        assert mcnemar(a, b) == 1.0


def test_holm_is_that_of_statsmodels() -> None:
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": 0.9}
    wanted = multipletests(list(p.values()), method="holm")[1]
    assert list(holm(p).values()) == pytest.approx(list(wanted))
    assert list(holm(p)) == list(p)
    assert holm({}) == {}


def test_a_mean_drawn_by_clusters_agrees_with_drawing_them_one_by_one() -> None:
    rng = np.random.default_rng(0)
    x, names = rng.normal(size=96).tolist(), [i // 4 for i in range(96)]
    fast = mean_interval(x, names, draws=4000)
    rows = np.array(x).reshape(24, 4)
    means = [rows[rng.integers(24, size=24)].mean() for _ in range(4000)]
    assert fast == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.03)
    assert mean_interval(x, names) == mean_interval(x, names)


@pytest.mark.parametrize("prompts", [2, 3, 5, 12, 30])
def test_the_interval_of_a_mean_holds_it_with_few_prompts_too(prompts: int) -> None:
    rng, hits = np.random.default_rng(3), 0
    names = np.repeat(np.arange(prompts), 4).tolist()
    for _ in range(600):
        x = np.repeat(rng.normal(size=prompts), 4) + 0.3 * rng.normal(size=4 * prompts)
        low, high = mean_interval(x.tolist(), names)
        hits += low <= 0 <= high
    assert 0.92 < hits / 600 < 0.98


def test_few_clusters_of_one_give_students_interval() -> None:
    x = np.random.default_rng(1).normal(2, 3, 7)
    wanted = stats.t.interval(0.95, 6, x.mean(), stats.sem(x))
    assert mean_interval(x.tolist(), range(7)) == pytest.approx(wanted)


def test_clusters_of_one_give_the_usual_interval_of_a_mean() -> None:
    x = np.random.default_rng(1).normal(2, 3, 400)
    low, high = mean_interval(x.tolist(), range(400))
    half = 1.96 * x.std() / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.05)


def coverage(interval, clustered: bool) -> float:
    """How often a 95 % interval holds the true rate, 0.3, of 30 prompts of 10 pictures each."""
    rng, hits = np.random.default_rng(2), 0
    names = np.repeat(np.arange(30), 10)
    for _ in range(400):
        p = rng.beta(0.6, 1.4, 30) if clustered else np.full(30, 0.3)
        low, high = interval((rng.random(300) < np.repeat(p, 10)).tolist(), names.tolist())
        hits += low <= 0.3 <= high
    return hits / 400


def test_pictures_of_one_prompt_are_no_independent_trials() -> None:
    naive = coverage(lambda x, _: wilson(sum(x), len(x)), clustered=True)
    assert naive < 0.75
    assert coverage(clustered_wilson, clustered=True) > 0.91
    assert coverage(clustered_wilson, clustered=False) > 0.93


def test_a_clustered_rate_of_zero_says_as_much_as_its_prompts() -> None:
    names = [i // 10 for i in range(100)]
    assert clustered_wilson([False] * 100, names) == pytest.approx(wilson(0, 10))
    assert clustered_wilson([True] * 100, names) == pytest.approx(wilson(10, 10))
    assert clustered_wilson([True, False, False], "abc") == wilson(1, 3)
    assert clustered_wilson([], []) == (0.0, 1.0)
    # Prompts that all behave alike say as much as all their pictures.
    assert worth(np.tile([1.0, 0.0], 50), np.repeat(np.arange(50), 2).tolist()) == 100


@pytest.mark.parametrize(("n", "prompts"), [(300, 30), (100, 51), (400, 8)])
def test_one_success_does_not_make_the_trials_independent(n: int, prompts: int) -> None:
    names = [i % prompts for i in range(n)]
    _, none = clustered_wilson([False] * n, names)
    low, one = clustered_wilson([True] + [False] * (n - 1), names)
    assert one > 0.95 * none
    assert low < 1 / n
    _, unknown = clustered_wilson([None] + [False] * (n - 1), names)
    assert unknown >= max(one, none)


def test_the_interval_of_a_paired_difference_holds_it() -> None:
    rng, hits = np.random.default_rng(3), 0
    for _ in range(500):
        a = rng.random(40) < 0.9
        b = np.where(rng.random(40) < 0.25, False, a)
        low, high = paired_interval(a.tolist(), b.tolist(), range(40))
        hits += low <= -0.9 * 0.25 <= high
    assert hits / 500 > 0.92
    low, high = paired_interval([True] * 4, [False] * 4, range(4))
    assert low == -1.0
    assert high > -0.6


@pytest.mark.parametrize("alike", [1, 5])
@pytest.mark.parametrize("kept", [0.95, 0.6, 0.1])
def test_the_interval_of_a_ratio_holds_it(kept: float, alike: int) -> None:
    """60 prompts of one picture, or of five that are alike."""
    rng, hits, naive = np.random.default_rng(4), 0, 0
    names = np.repeat(np.arange(60), alike).tolist()
    for _ in range(500):
        a = np.repeat(rng.random(60) < 0.9, alike)
        b = np.repeat(rng.random(60) < kept, alike) & a
        low, high = ratio_of_answers(a.tolist(), b.tolist(), names)
        hits += low <= kept <= high
        low, high = ratio_of_answers(a.tolist(), b.tolist(), range(len(a)))
        naive += low <= kept <= high
    assert hits / 500 > 0.92
    assert alike == 1 or naive / 500 < 0.8


def test_the_interval_of_a_ratio_is_the_delta_methods_with_many_trials() -> None:
    both, lost, won, n = 7000, 1000, 500, 10_000
    a = [True] * (both + lost) + [False] * (n - both - lost)
    b = [True] * both + [False] * lost + [True] * won + [False] * (n - both - lost - won)
    ratio = (both + won) / (both + lost)
    log = 1.96 * np.sqrt((lost + won) / ((both + lost) * (both + won)))
    wanted = pytest.approx((ratio * np.exp(-log), ratio * np.exp(log)), abs=1e-3)
    assert ratio_of_answers(a, b, range(n)) == wanted
    assert ratio_of_numbers(np.float64(a), np.float64(b), range(n)) == pytest.approx(
        (ratio * np.exp(-log), ratio * np.exp(log)), abs=2e-3
    )


def test_the_ends_of_a_ratio() -> None:
    yes, no = [True] * 20, [False] * 20
    assert ratio_of_answers(no, yes, range(20)) is None
    low, high = ratio_of_answers(yes, no, range(20))
    assert low == 0 < high < 0.25
    low, high = ratio_of_answers(yes, yes, range(20))
    assert 0.8 < low < 1 < high < 1.25
    wide = ratio_of_answers(yes, [None, *yes[1:]], range(20))
    assert wide[0] < low
    assert wide[1] >= high
    assert ratio_of_answers([None] * 20, yes, range(20)) is None
    assert ratio_of_numbers([1.0, None], [2.0, 2.0], range(2)) is None
    assert ratio_of_numbers([-1.0, 1.0], [2.0, 2.0], range(2)) is None
    assert ratio_of_numbers([1.0, 2.0], [2.0, 4.0], "aa") == (2.0, 2.0)


def test_sign_flips_agree_with_all_of_them() -> None:
    a, b = np.zeros(8), np.array([1.0, 2, -0.5, 3, 1, 0.2, -0.1, 2])
    every = [abs(np.dot(s, b)) for s in itertools.product((-1, 1), repeat=8)]
    exact = np.mean([x >= abs(b.sum()) - 1e-12 for x in every])
    assert sign_flip(a, b, range(8), draws=40_000) == pytest.approx(exact, abs=0.005)
    assert sign_flip(a, a, range(8)) == 1.0
    reference = stats.wilcoxon(b).pvalue
    assert abs(sign_flip(a, b, range(8)) - reference) < 0.06


def test_answers_are_compared_where_both_are_known() -> None:
    a = [True, True, None, False, True, True]
    b = [False, False, True, None, True, False]
    found = compare_answers(a, b, "abcdef")
    assert found is not None
    assert (found.n, found.difference, found.p) == (4, -0.75, 0.25)
    assert found.low < -0.75 < found.high
    assert compare_answers([None], [True], "a") is None
    repeated = compare_answers([True] * 12, [False] * 12, "aaaabbbbcccc")
    assert repeated is not None
    # Three prompts that all changed: two of eight sign patterns are as far.
    assert repeated.p == pytest.approx(0.25, abs=0.02)


def test_shares_are_compared_in_pairs() -> None:
    """Of three trainings, on sixty pictures: wider than the truth, and never without width."""
    rng, hits = np.random.default_rng(4), 0
    for _ in range(300):
        a = rng.binomial(3, 0.9, size=60) / 3
        b = rng.binomial(3, 0.4, size=60) / 3
        found = compare_shares(a.tolist(), b.tolist(), range(60))
        assert found is not None
        hits += found.low <= -0.5 <= found.high
        assert found.low < found.difference < found.high
    assert hits / 300 > 0.93
    assert found.p < 1e-3
    flipped = compare_shares([1.0] * 4, [0.0] * 4, range(4))
    assert flipped is not None
    assert (flipped.low, flipped.high) == paired_interval([True] * 4, [False] * 4, range(4))
    assert flipped.high > -0.6
    assert compare_shares([1.0, None], [None, 0.5], "ab") is None


def test_draws_in_blocks_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.random(90), rng.random(90)
    names = [i // 3 for i in range(90)]
    D = np.bincount(names, b - a)
    signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(10_000, 30))
    far = (np.abs(signs @ D) >= abs(D.sum()) * (1 - 1e-12)).sum()
    drawn = np.random.default_rng(0).integers(30, size=(2000, 30))
    means = np.bincount(names, a)[drawn].sum(1) / np.bincount(names)[drawn].sum(1)
    for at_once in (1, 100, 7_777, 10**9):
        monkeypatch.setattr(significance, "AT_ONCE", at_once)
        assert sign_flip(a, b, names) == (1 + far) / 10_001
        assert mean_interval(a, names) == tuple(np.quantile(means, [0.025, 0.975]))


def test_many_prompts_take_little_memory() -> None:
    changed = np.arange(8000) % 5 == 0
    names = np.repeat(np.arange(4000), 2).tolist()
    tracemalloc.start()
    sign_flip(changed, changed[::-1] * 0.5, names, draws=2000)
    mean_interval(changed.astype(float), names)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 60e6


def test_the_front_holds_what_nothing_beats() -> None:
    points = {
        "a": (0.0, 0.9),
        "b": (0.1, 0.99),
        "c": (0.1, 0.95),
        "d": (0.5, 1.0),
        "a2": (0.0, 0.9),
    }
    assert pareto(points, [False, True]) == ["a", "b", "d", "a2"]
    assert pareto(points, [True, True]) == ["d"]


def test_training_seeds_are_draws_of_their_own() -> None:
    mean, low, high = over_seeds([0.90, 0.94, 0.98])
    assert mean == pytest.approx(0.94)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, 0.94, 0.04 / np.sqrt(3)))
    with pytest.raises(ValueError, match="two or more"):
        over_seeds([0.9])


@pytest.mark.parametrize("bad", [([], []), ([1.0], []), ([1.0, 2.0], "aa")])
def test_nothing_has_no_interval(bad) -> None:
    with pytest.raises(ValueError, match="clusters"):
        mean_interval(*bad)


def test_a_permutation_of_pairs_is_that_of_scipy() -> None:
    rng = np.random.default_rng(5)
    a = rng.normal(size=14)
    b = a + rng.normal(0.8, 0.8, size=14)
    found = compare_numbers(a.tolist(), b.tolist(), range(14))
    reference = stats.permutation_test(
        (b, a),
        lambda x, y, axis: (x - y).mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**14,
    )
    assert found is not None
    assert 0.005 < reference.pvalue < 0.5
    assert found.p == pytest.approx(reference.pvalue, abs=0.004)
    assert compare_numbers(a.tolist(), b.tolist(), range(14)) == found


def test_many_pairs_agree_with_normal_theory() -> None:
    rng = np.random.default_rng(6)
    a = rng.normal(27, 3, 400)
    b = a + rng.normal(0.1, 1.0, 400)
    found = compare_numbers(a.tolist(), b.tolist(), range(400))
    assert found is not None
    d = b - a
    half = 1.96 * d.std() / 20
    assert (found.difference, found.n) == (pytest.approx(d.mean()), 400)
    assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.01)
    assert found.p == pytest.approx(stats.ttest_rel(b, a).pvalue, abs=0.015)


def test_pairs_of_one_prompt_are_drawn_and_flipped_together() -> None:
    """Pairs that all differ by the luck of their prompt: single ones would be nearly certain."""
    luck = np.repeat(np.random.default_rng(7).normal(0.3, 1.0, 6), 20)
    a = [0.0] * 120
    whole = compare_numbers(a, luck.tolist(), np.repeat(range(6), 20).tolist())
    single = compare_numbers(a, luck.tolist(), range(120))
    assert whole is not None
    assert single is not None
    assert whole.p >= 1 / 2**5
    assert whole.high - whole.low > 3 * (single.high - single.low)
    # Of one prompt there is nothing but pictures to draw; of one picture, nothing.
    assert compare_numbers(a, luck.tolist(), ["same"] * 120) == single
    assert compare_numbers([1.0, None], [2.0, 3.0], "ab") is None
