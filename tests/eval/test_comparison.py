"""Differences between evaluations, against scipy's tests and counting by hand."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from expunge.errors import UserError
from expunge.eval.comparison import Method, compare
from expunge.eval.runs import Run


def edited(run: Run, change: Callable[[dict[str, Any], list[Any]], object]) -> Run:
    report, rows = json.loads(json.dumps([run.report, run.rows]))
    change(report, rows)
    return Run(run.folder, report, rows, run.images)


def trained(run: Run, seed: int, target: float) -> Run:
    """Another training's evaluation: other weights, other rates."""

    def change(report: dict[str, Any], rows: list[Any]) -> None:
        report["generators"]["erased"]["components"]["unet"] = f"seed {seed}"
        report["metrics"]["target_seen"] |= {"value": target}

    return edited(run, change)


def test_identical_evaluations_do_not_differ(runs: tuple[Run, Run]) -> None:
    a, _ = runs
    found = compare([Method("one", (a,)), Method("two", (a,))])
    between = [d for d in found.differences if d.against == "one"]
    assert {d.metric for d in between} == set(a.report["metrics"])
    for d in between:
        assert d.paired is not None
        assert d.paired.low < d.paired.difference == 0 < d.paired.high
        assert d.paired.p == d.p_holm == 1
        assert (d.paired.n, d.unknown) == (2, 0)


def test_differences_are_those_of_the_pairs(runs: tuple[Run, Run]) -> None:
    def change(report: dict[str, Any], rows: list[Any]) -> None:
        for i, row in enumerate(rows):
            row["prompt"] = f"prompt {i}"
            for metric in row["erased"]["answers"]:
                row["erased"]["answers"][metric] = i % 3 == 0

    # Ten of each, so that something is to be counted.
    def lengthen(report: dict[str, Any], rows: list[Any]) -> None:
        rows.extend(json.loads(json.dumps(rows * 4)))

    a, b = (edited(run, lengthen) for run in runs)
    b = edited(b, change)
    a = edited(a, lambda _, rows: [r.update(prompt=f"prompt {i}") for i, r in enumerate(rows)])
    found = compare([Method("a", (a,)), Method("b", (b,))])
    for d in found.differences:
        if d.of == "b":
            theirs = a.answers(d.metric, "base" if d.against == "base" else None)
            both = (theirs, b.answers(d.metric))
            x, y = (np.array(list(answers.values()), float) for answers in both)
            won, lost = int(((y - x) > 0).sum()), int(((x - y) > 0).sum())
            p = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
            assert d.paired is not None
            assert d.paired.difference == pytest.approx((y - x).mean())
            assert d.paired.p == pytest.approx(p)
            assert (d.test, d.paired.n) == ("McNemar, exact", 10)
    ps = sorted((d.paired.p, d.p_holm) for d in found.differences if d.paired and d.p_holm)
    assert len(ps) == found.tests == len(found.differences) == 18
    assert ps[0][0] < 1
    most = 0.0
    for k, (p, corrected) in enumerate(ps):
        most = max(most, min(1, (18 - k) * p))
        assert corrected == pytest.approx(most)


def test_prompts_that_repeat_are_drawn_and_flipped_whole(runs: tuple[Run, Run]) -> None:
    a = edited(runs[0], lambda _, rows: [row.update(prompt="the same") for row in rows])
    found = compare([Method("one", (a,)), Method("two", (a,))])
    assert {d.test for d in found.differences} == {"permutation of prompts"}


def test_what_is_unknown_is_left_out_and_counted(runs: tuple[Run, Run]) -> None:
    def change(report: dict[str, Any], rows: list[Any]) -> None:
        rows[0]["erased"]["answers"]["target_seen"] = None

    a, b = runs
    found = compare([Method("a", (a,)), Method("b", (edited(b, change),))])
    for d in found.differences:
        hurt = d.of == "b" and d.metric == "target_seen"
        assert d.paired is not None
        assert (d.unknown, d.paired.n) == ((1, 1) if hurt else (0, 2))

    def blind(report: dict[str, Any], rows: list[Any]) -> None:
        for row in rows:
            row["erased"]["answers"] = dict.fromkeys(row["erased"]["answers"])

    none = compare([Method("b", (edited(b, blind),))]).differences
    assert all(d.paired is None and d.test is None and d.unknown == 2 for d in none)
    assert none[0].to_dict()["p"] is None


def test_trainings_are_the_trials_of_a_method_with_several(runs: tuple[Run, Run]) -> None:
    a, b = runs
    seeds = tuple(trained(b, i, value) for i, value in enumerate((0.1, 0.2, 0.6)))
    method = Method("ours", seeds)
    m = method.metrics()["target_seen"]
    half = stats.t.ppf(0.975, 2) * np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3)
    assert m["value"] == pytest.approx(0.3)
    assert (m["low"], m["high"]) == (0.0, pytest.approx(0.3 + half))
    # Trainings that agree by chance are not certain.
    same = Method("same", tuple(trained(b, i, 0.5) for i in range(3))).metrics()["target_seen"]
    own = b.report["metrics"]["target_seen"]
    below = math.sqrt(3 * ((0.5 - own["low"]) / 3) ** 2)
    assert same["low"] == pytest.approx(0.5 - below)
    assert (m["checkpoints"], m["n"]) == ([0.1, 0.2, 0.6], 6)
    found = compare([Method("a", (a,)), method])
    for d in found.differences:
        if (d.of, d.against) == ("ours", "a"):
            ours = np.mean([list(run.answers(d.metric).values()) for run in seeds], axis=0)
            theirs = np.array(list(a.answers(d.metric).values()), float)
            assert d.paired is not None
            assert d.paired.difference == pytest.approx(np.mean(ours - theirs))
            assert d.test == "permutation of prompts"
    assert any("several trainings" in note for note in found.notes)
    with pytest.raises(UserError, match="same model"):
        Method("ours", (b, b))
    blind = edited(seeds[0], lambda report, _: report["metrics"]["target_seen"].update(value=None))
    assert Method("x", (blind, *seeds[1:])).metrics()["target_seen"]["value"] is None


def test_another_base_is_no_base(runs: tuple[Run, Run]) -> None:
    a, b = runs
    other = edited(b, lambda report, _: report["generators"]["base"].update(dtype="float16"))
    found = compare([Method("a", (a,)), Method("b", (other,))])
    assert found.base is None
    assert {d.against for d in found.differences} == {"a"}
    assert any("different bases" in note for note in found.notes)


def test_a_base_that_is_the_others_is_said(runs: tuple[Run, Run]) -> None:
    a, b = runs

    def without(report: dict[str, Any], rows: list[Any]) -> None:
        report["base"] = None
        del report["generators"]["base"]

    alone = edited(b, without)
    found = compare([Method("a", (a,)), Method("b", (alone,))])
    assert found.base is a
    assert any(f"{alone.folder}: evaluated without a base" in note for note in found.notes)
    assert not any("without a base" in note for note in compare([Method("a", (a,))]).notes)


def test_trainings_of_which_all_pairs_flip_are_not_certain(runs: tuple[Run, Run]) -> None:
    def answering(run: Run, yes: bool) -> Run:
        def change(report: dict[str, Any], rows: list[Any]) -> None:
            for i, row in enumerate(rows):
                row["prompt"] = f"prompt {i}"
                row["erased"]["answers"] = dict.fromkeys(row["erased"]["answers"], yes)

        return edited(run, change)

    a, b = answering(runs[0], True), answering(runs[1], False)
    ours = Method("ours", tuple(trained(b, i, 0.0) for i in range(2)))
    found = compare([Method("a", (a,)), ours]).differences
    for d in (d for d in found if d.against == "a"):
        assert d.paired is not None
        assert d.paired.low == d.paired.difference == -1.0
        assert d.paired.high > -0.6
