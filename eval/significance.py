"""Intervals and tests: of clustered samples, of pairs, of many metrics at once.

Wilson's interval of a single rate is `expunge.results.wilson`. All that is random is drawn from a
seed, so that a report says the same twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from expunge.results import wilson

DRAWS = 2000
LEVEL = 0.95
# Numbers drawn at once: ten thousand draws of ten thousand prompts would be gigabytes.
AT_ONCE = 1_000_000
FEW = 20
Values = NDArray[np.float64]


def mean_interval(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % interval of the mean of numbers that come in clusters.

    Several pictures of one prompt are no independent trials; drawing prompts instead of pictures
    keeps an interval's coverage: the percentile bootstrap of whole clusters (Cameron, Gelbach,
    Miller 2008, doi:10.1162/rest.90.3.414). With fewer than `FEW`, of which the bootstrap holds too
    little (of three the truth in 7 of 10 cases), Student's t of their sums instead,
    x̄ ± t_{C−1} √(C / (C − 1) Σ_c (s_c − n_c x̄)²) / N (Cochran 1977, Sampling Techniques,
    chapter 6).

    Args:
        values: N numbers.
        clusters: Which of two or more clusters each belongs to, usually its prompt.
        draws: Bootstrap samples.
        seed: Decides them.

    Raises:
        ValueError: Lengths that differ, or fewer than two clusters.
    """
    if len(values) != len(clusters) or len(set(clusters)) < 2:
        raise ValueError(f"got {len(values)} values in {len(set(clusters))} clusters")
    member, x = _member(clusters), np.asarray(values, np.float64)
    found = _ratio_of_sums(np.bincount(member, x), np.bincount(member), draws, seed)
    assert found is not None  # no cluster is empty
    return found


def _member(clusters: Sequence[Hashable]) -> list[int]:
    """The number of each one's cluster."""
    number = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    return [number[name] for name in clusters]


def _ratio_of_sums(
    above: NDArray[Any], below: NDArray[Any], draws: int = DRAWS, seed: int = 0
) -> tuple[float, float] | None:
    """Of Σ_c above_c / Σ_c below_c over C clusters; None where what is below is not above 0."""
    C = len(below)
    if C < FEW:
        if not (below > 0).all():
            return None
        ratio = above.sum() / below.sum()
        error = np.sqrt(C / (C - 1) * ((above - ratio * below) ** 2).sum()) / below.sum()
        half = stats.t.ppf(0.5 + LEVEL / 2, C - 1) * error
        return float(ratio - half), float(ratio + half)
    rng = np.random.default_rng(seed)
    parts = (rng.integers(C, size=shape) for shape in _blocks(draws, C))
    drawn = [[side[part].sum(1) for side in (above, below)] for part in parts]
    top, bottom = (np.concatenate(side) for side in zip(*drawn, strict=True))
    return _interval(top / bottom) if (bottom > 0).all() else None


def clustered_wilson(
    answers: Sequence[bool | None], clusters: Sequence[Hashable]
) -> tuple[float, float]:
    """Wilson's interval of a rate whose trials come in clusters, such as pictures of one prompt.

    The trials count as `worth` so many independent ones (the interval after Korn and Graubard
    1998). An answer that is None may be either: the ends are those of no such trial being a success
    and of all, and the trials are worth the less of the two.
    """
    if not len(answers):
        return wilson(0, 0)
    least = np.array([answer is True for answer in answers], np.float64)
    most = np.array([answer is not False for answer in answers], np.float64)
    n = min(worth(x, clusters) for x in (least, most))
    return wilson(float(least.mean()) * n, n)[0], wilson(float(most.mean()) * n, n)[1]


def worth(
    values: Values, clusters: Sequence[Hashable], ends: tuple[float, float] = (0.0, 1.0)
) -> float:
    """How many independent trials N clustered numbers are worth, N / d.

    d = max(1, Σ_c (s_c − x̄ n_c)² / Σ_i (x_i − x̄)²) over clusters of n_c numbers and sum s_c (Kish's
    design effect). Few differences say little of how alike those of a cluster are, so that two
    clusters of average size are added, one at each end (as successes and failures are by Agresti
    and Coull 1998): without any difference the clusters count, not the numbers. With a cluster for
    each number it is N.

    Args:
        values: N numbers.
        clusters: Which cluster each belongs to.
        ends: The least and the most that a number can be.
    """
    n, added = len(values), np.array(ends)
    C = len(set(clusters))
    if n == C:
        return n
    size, member = n / C, _member(clusters)
    sums = np.append(np.bincount(member, values), added * size)
    sizes = np.append(np.bincount(member), [size, size])
    mean = sums.sum() / sizes.sum()
    within = ((values - mean) ** 2).sum() + size * ((added - mean) ** 2).sum()
    between = ((sums - mean * sizes) ** 2).sum()
    return n / max(1.0, float(between / within))


@dataclass(frozen=True)
class Paired:
    """A difference between two things measured on the same (prompt, seed).

    Attributes:
        difference: Mean of b − a.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p: Of the hypothesis that there is none, two-sided.
        n: Pairs of which both could be judged.
    """

    difference: float
    low: float
    high: float
    p: float
    n: int


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """The exact two-sided p of McNemar's test (1947, doi:10.1007/BF02295996).

    Of the pairs that disagree, n01 + n10, each is as likely to be the one as the other:
    p = min(1, 2 P[Binomial(n01 + n10, ½) ≤ min(n01, n10)]); without any, 1.
    """
    if len(a) != len(b):
        raise ValueError(f"got {len(a)} and {len(b)} answers; allowed: pairs")
    lost = sum(x and not y for x, y in zip(a, b, strict=True))
    won = sum(y and not x for x, y in zip(a, b, strict=True))
    if not lost + won:
        return 1.0
    return float(stats.binomtest(min(lost, won), lost + won, 0.5).pvalue)


def paired_interval(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[float, float]:
    """The 95 % interval of the difference of two rates over the same N trials.

    Δ̃ ± z √((p̃01 + p̃10 − Δ̃²) / (n + 2)), p̃ = (count + 1) / (n + 2), Δ̃ = p̃01 − p̃10 (Bonett and
    Price 2012, doi:10.3102/1076998611411915): a bootstrap says [−1, −1] where all pairs disagree,
    of four pairs too. Where trials are shares of several answers, Δ̃ counts their differences and
    p̃01 + p̃10 the squares of these. Clustered pairs count as `worth` so many.
    """
    d = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    n = worth(d, clusters, (-1.0, 1.0))
    gains, losses = np.maximum(d, 0), np.maximum(-d, 0)
    difference = _one_more(gains, n) - _one_more(losses, n)
    square = _one_more(gains**2, n) + _one_more(losses**2, n)
    z = float(stats.norm.ppf(0.5 + LEVEL / 2))
    half = z * float(np.sqrt((square - difference**2) / (n + 2)))
    return max(-1.0, difference - half), min(1.0, difference + half)


def ratio_of_answers(
    a: Sequence[bool | None], b: Sequence[bool | None], clusters: Sequence[Hashable]
) -> tuple[float, float] | None:
    """The 95 % interval of the ratio of two rates over the same N trials, b's to a's.

    Of both rates Wilson's interval over the n* trials of which a or b succeeds, the one's low end
    over the other's high end and the other way round, at the critical value k z that makes this a
    95 % interval of the ratio (Bonett and Price 2006, doi:10.1002/sim.2440):
    k = A / (B + C), A = √((n10 + n01 + 2) / ((x_a + 1)(x_b + 1))),
    B and C = √((1 − p̃) / (x + 1)), p̃ = (x + 1) / (n* + 2).
    Clustered trials count as those of b − (x_b / x_a) a are `worth`. An answer that is None may be
    either: the ends are those of the worst and of the best.

    Returns:
        None where a never succeeds, which nothing is a share of.
    """
    ends = []
    for ours in (False, True):
        y, x = (
            np.array([missing if v is None else v for v in side], np.float64)
            for side, missing in ((b, ours), (a, not ours))
        )
        if not x.any():
            return None
        ends.append(_ratio_of_shares(x, y, clusters))
    return ends[0][0], ends[1][1]


def _ratio_of_shares(a: Values, b: Values, clusters: Sequence[Hashable]) -> tuple[float, float]:
    ratio = b.sum() / a.sum()
    each = worth(b - ratio * a, clusters, (-ratio, 1.0)) / len(a)
    x_a, x_b, apart, either = (
        each * float(v.sum()) for v in (a, b, np.abs(b - a), np.maximum(a, b))
    )
    A = np.sqrt((apart + 2) / ((x_a + 1) * (x_b + 1)))
    B, C = (np.sqrt((1 - (x + 1) / (either + 2)) / (x + 1)) for x in (x_a, x_b))
    kz = float(A / (B + C) * stats.norm.ppf(0.5 + LEVEL / 2))
    (low_a, high_a), (low_b, high_b) = (wilson(x, either, kz) for x in (x_a, x_b))
    return low_b / high_a, high_b / low_a


def ratio_of_numbers(
    a: Sequence[float | None], b: Sequence[float | None], clusters: Sequence[Hashable]
) -> tuple[float, float] | None:
    """The same of two means of numbers, as `mean_interval` of whole pairs.

    Returns:
        None with fewer than two pairs, or where a mean of a that is drawn, or with few clusters
        that of any, is nothing or less.
    """
    pairs = [(x, y, c) for x, y, c in zip(a, b, clusters, strict=True) if None not in (x, y)]
    if len(pairs) < 2:
        return None
    x, y = (np.array([pair[side] for pair in pairs], np.float64) for side in (0, 1))
    names = [pair[2] for pair in pairs]
    member = _member(names if len(set(names)) > 1 else range(len(pairs)))
    return _ratio_of_sums(np.bincount(member, y), np.bincount(member, x))


def _one_more(x: Values, n: float) -> float:
    """(count + 1) / (n + 2), of numbers that n independent trials are worth."""
    return (float(np.mean(x)) * n + 1) / (n + 2)


def sign_flip(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> float:
    """The two-sided p of a paired permutation test: were a and b exchangeable within a cluster?

    p = (1 + #{|Σ s_c D_c| ≥ |Σ D_c|}) / (1 + draws), D_c the sum of b − a over cluster c, s_c = ±1.
    """
    difference = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    D = np.bincount(_member(clusters), difference)
    # What is equal but for rounding counts as at least as far.
    least = abs(D.sum()) * (1 - 1e-12)
    if least == 0:
        return 1.0
    rng = np.random.default_rng(seed)
    signs = (rng.choice((-1.0, 1.0), size=shape) for shape in _blocks(draws, len(D)))
    far = sum(int((np.abs(part @ D) >= least).sum()) for part in signs)
    return (1 + far) / (1 + draws)


def compare_answers(
    a: Sequence[bool | None], b: Sequence[bool | None], clusters: Sequence[Hashable]
) -> Paired | None:
    """Two models' answers to the same questions; what one of them has unknown is left out.

    The interval is `paired_interval`. McNemar's test takes pairs for independent; where prompts
    repeat, the permutation test of whole prompts takes its place.

    Returns:
        None without a pair.
    """
    kept = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if None not in (x, y)]
    if not kept:
        return None
    x, y, names = [[bool(a[i]) for i in kept], [bool(b[i]) for i in kept],
                   [clusters[i] for i in kept]]  # fmt: skip
    low, high = paired_interval(x, y, names)
    alone = len(set(names)) == len(names)
    p = mcnemar(x, y) if alone else sign_flip(x, y, names)
    return Paired(float(np.mean(y) - np.mean(x)), low, high, p, len(kept))


def compare_shares(
    a: Sequence[float | None], b: Sequence[float | None], clusters: Sequence[Hashable]
) -> Paired | None:
    """The same where an answer is a share, of several trainings' answers; p permutes prompts."""
    kept = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if None not in (x, y)]
    if not kept:
        return None
    x, y = ([float(side[i] or 0) for i in kept] for side in (a, b))
    names = [clusters[i] for i in kept]
    low, high = paired_interval(x, y, names)
    return Paired(float(np.mean(y) - np.mean(x)), low, high, sign_flip(x, y, names), len(kept))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values of several tests, corrected so that one false alarm in all has at most their level.

    The k-th smallest of m becomes max over j ≤ k of min(1, (m − j + 1) p_j) (Holm 1979,
    https://www.jstor.org/stable/4615733).
    """
    found, most = {}, 0.0
    for k, name in enumerate(sorted(p, key=lambda name: p[name])):
        most = max(most, min(1.0, (len(p) - k) * p[name]))
        found[name] = most
    return {name: found[name] for name in p}


def pareto(points: Mapping[str, Sequence[float]], higher_is_better: Sequence[bool]) -> list[str]:
    """The names that no other beats: none is as good in every number and better in one.

    Args:
        points: Name -> its numbers.
        higher_is_better: The direction of each number.
    """
    sign = np.where(np.asarray(higher_is_better), 1.0, -1.0)
    good = {name: np.asarray(x, np.float64) * sign for name, x in points.items()}
    return [
        name
        for name, x in good.items()
        if not any(np.all(y >= x) and np.any(y > x) for y in good.values())
    ]


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over training seeds, and its 95 % interval by Student's t: one checkpoint is one draw.

    Raises:
        ValueError: Fewer than two.
    """
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        raise ValueError(f"got {len(x)} training seeds; allowed: two or more")
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def compare_numbers(
    a: Sequence[float | None], b: Sequence[float | None], clusters: Sequence[Hashable]
) -> Paired | None:
    """The same where each picture has a number, such as its CLIP score: the paired bootstrap.

    The interval is `mean_interval`'s of the mean of b − a: prompts are drawn, and with each all
    its pairs (Efron and Tibshirani 1993, An Introduction to the Bootstrap). p is `sign_flip`'s: a
    permutation test keeps its level with few prompts, the data themselves being one of its draws
    (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585). Of a single prompt, pictures are drawn and
    flipped.

    Returns:
        None with fewer than two pairs, which do not tell how they spread.
    """
    kept = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if None not in (x, y)]
    if len(kept) < 2:
        return None
    x, y = (np.array([side[i] for i in kept], np.float64) for side in (a, b))
    names = [clusters[i] for i in kept]
    names = names if len(set(names)) > 1 else list(range(len(kept)))
    low, high = mean_interval((y - x).tolist(), names)
    p = sign_flip(x.tolist(), y.tolist(), names)
    return Paired(float((y - x).mean()), low, high, p, len(kept))


def _blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Shapes of parts of a matrix, each of about `AT_ONCE` numbers: the same numbers in turn."""
    step = max(1, AT_ONCE // max(1, width))
    for start in range(0, rows, step):
        yield min(step, rows - start), width


def _interval(found: Values) -> tuple[float, float]:
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
