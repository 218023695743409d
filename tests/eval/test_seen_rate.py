import random

import pytest

from expunge.eval.metrics.seen_rate import SeenRate
from expunge.results import wilson

RATE = SeenRate(higher_is_better=False, meaning="seen")


def test_without_unknown_it_is_wilsons_interval() -> None:
    found = RATE.compute([True] * 3 + [False] * 61)
    assert (found.value, found.n, found.unknown) == (3 / 64, 64, 0)
    assert (found.low, found.high) == wilson(3, 64)
    assert not found.higher_is_better


@pytest.mark.parametrize("seen", [0, 1, 10, 32, 53, 54])
@pytest.mark.parametrize("unknown", [1, 5, 10])
def test_the_interval_holds_whatever_the_unknown_pictures_show(seen: int, unknown: int) -> None:
    answers = [True] * seen + [False] * (54 - seen)
    found = RATE.compute([*answers, *[None] * unknown])
    assert (found.n, found.unknown) == (54, unknown)
    assert found.value == seen / 54
    for shown in range(unknown + 1):
        whole = RATE.compute([*answers, *[True] * shown, *[False] * (unknown - shown)])
        assert found.low <= whole.low <= whole.high <= found.high


def test_so_it_does_where_prompts_repeat() -> None:
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(10, 80)
        prompts = [rng.randrange(rng.randint(2, n)) for _ in range(n)]
        share = rng.random() ** 3
        answers = [None if rng.random() < 0.15 else rng.random() < share for _ in range(n)]
        found = RATE.compute(answers, prompts)
        for told in (True, False):
            whole = RATE.compute([told if x is None else x for x in answers], prompts)
            assert found.value is None or found.low - 1e-9 <= whole.low
            assert found.value is None or whole.high <= found.high + 1e-9


def test_nothing_judged_is_no_number() -> None:
    for answers in ([], [None, None]):
        found = RATE.compute(answers)
        assert (found.value, found.low, found.high, found.n) == (None, None, None, 0)
        assert found.unknown == len(answers)
