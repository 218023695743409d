"""The arithmetic of attack success: what could not be judged is neither success nor failure."""

import itertools

import numpy as np
import pytest

from expunge.eval.attacks.rates import best_of, either, outcomes, rate, results
from expunge.eval.attacks.relearning import Relearning, reached
from expunge.eval.significance import clustered_wilson
from expunge.results import wilson

number = itertools.count()


def row(before, *after, base=True, prompt=None):
    """A case of a prompt of its own, unless it is told."""
    prompt = prompt or f"prompt {next(number)}"
    trials = [{"said": "step 1", "prompt": prompt, "seen": seen} for seen in after]
    return {"prompt": prompt, "base": base, "before": before, "trials": trials}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([], False), ([False], False), ([True], True), ([None], None),
        ([False, None], None), ([None, True], True), ([False, True, None], True),
    ],
)  # fmt: skip
def test_either(answers, expected) -> None:
    assert either(answers) is expected


def test_prompts_that_succeed_by_themselves_count() -> None:
    rows = [row(True), row(False, False, True), row(False, False), row(False, False)]
    found = results(rows)
    assert (found["pre_asr"].value, found["pre_asr"].n) == (0.25, 4)
    assert (found["asr"].value, found["asr"].n) == (0.5, 4)
    assert (found["asr"].low, found["asr"].high) == pytest.approx(wilson(2, 4))
    assert found["base"].value == 1.0
    assert not found["asr"].higher_is_better


def test_unknown_leaves_the_denominator_and_widens_the_interval() -> None:
    rows = [row(False, None), row(None, False), row(False, False), row(None, None, True)]
    found = results(rows)
    assert outcomes(rows) == [None, None, False, True]
    assert (found["asr"].value, found["asr"].n, found["asr"].unknown) == (0.5, 2, 2)
    assert (found["asr"].low, found["asr"].high) == (wilson(1, 4)[0], wilson(3, 4)[1])
    assert (found["pre_asr"].value, found["pre_asr"].n, found["pre_asr"].unknown) == (0.0, 2, 2)
    assert rate([None, None], ["a", "b"]).value is None


def test_best_of_k_counts_the_first_k_tries() -> None:
    rows = [row(True), row(False, False, False, True), row(False, True), row(False, False, None)]
    found = {k: (m.value, m.unknown) for k, m in best_of(rows).items()}
    assert found == {1: (0.5, 0), 2: (pytest.approx(2 / 3), 1), 3: (1.0, 1)}
    assert best_of([row(True)]) == {}


def test_pictures_of_one_prompt_are_no_independent_trials() -> None:
    rows = [row(k < 4, k < 8, base=True, prompt=f"{k // 4}") for k in range(20)]
    prompts = [r["prompt"] for r in rows]
    seen = {"base": [True] * 20, "pre_asr": [k < 4 for k in range(20)]}
    seen["asr"] = [k < 8 for k in range(20)]
    for name, m in results(rows).items():
        assert (m.low, m.high) == pytest.approx(clustered_wilson(seen[name], prompts)), name
        assert m.high - m.low > 1.3 * -np.subtract(*wilson(sum(seen[name]), 20)), name
    one = best_of(rows)[1]
    assert (one.low, one.high) == pytest.approx(clustered_wilson(seen["asr"], prompts))
    before, after = Relearning().findings(rows)["curve"]
    for point, name in ((before, "pre_asr"), (after, "asr")):
        low, high = clustered_wilson(seen[name], prompts)
        assert (point["low"], point["high"]) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ({1: [False, False], 2: [True, False], 5: [True, True]}, 2),
        ({1: [False, False], 2: [False, False]}, None),
        ({1: [None, None], 2: [None, None]}, "unknown"),
        ({1: [False, None], 2: [True, True]}, "unknown"),
        ({1: [True, None], 2: [True, True]}, 1),
    ],
)
def test_when_it_is_back_is_unknown_where_it_may_have_been_earlier(looks, expected) -> None:
    rows = [row(False), row(False)]
    for i, case in enumerate(rows):
        case["trials"] = [{"said": f"step {s}", "seen": seen[i]} for s, seen in looks.items()]
    assert Relearning().findings(rows)["back after"] == expected


def test_a_share_is_reached_whatever_the_unknown_ones_are() -> None:
    assert reached([None, False, False, False], 0.5) is False
    assert reached([None, True, False, False], 0.5) is None
    assert reached([None, True, True, False], 0.5) is True
    assert reached([True] * 7 + [False] * 93, 0.07) is True
