"""How measurements are shown beside each other: the front, the thesis's tables, signs."""

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from expunge.eval import front, thesis_form
from expunge.eval.display import difference, probability


def share(value: float | None, higher: bool, half: float = 0.1, **more: Any) -> dict[str, Any]:
    low, high = (None, None) if value is None else (value - half, value + half)
    found = {"value": value, "low": low, "high": high, "n": 9, "unknown": 0}
    return found | {"higher_is_better": higher} | more


def test_nobody_beats_those_on_the_front() -> None:
    def metrics(seen: float, *kept: float) -> dict[str, Any]:
        return {"seen": share(seen, False)} | {
            f"kept {i}": share(value, True) for i, value in enumerate(kept)
        }

    measured = {
        "base": metrics(1.0, 0.8, 0.5),
        "best": metrics(0.0, 0.6, 0.5),
        "gentle": metrics(0.2, 0.72, 0.5),
        "harsh": metrics(0.1, 0.4, 0.3),
        "lopsided": metrics(0.1, 0.2, 0.6),
    }
    found = front.points(measured, "base")
    assert found["base"].kept == 1
    assert found["best"].kept == pytest.approx((0.6 / 0.8 + 1) / 2)
    assert found["best"].seen_interval == pytest.approx((-0.1, 0.1))
    half = math.hypot(0.1 / 0.8, 0.1 / 0.5) / 2
    kept = found["best"].kept
    assert found["best"].kept_interval == pytest.approx((kept - half, kept + half))
    assert front.plane_front(found) == ["base", "best", "gentle"]
    # In all metrics its one strength keeps the lopsided one there.
    assert front.full_front(measured)[0] == ["base", "best", "gentle", "lopsided"]
    assert front.points(measured, None)["best"].kept == pytest.approx(0.55)


def test_what_has_no_value_is_no_point_and_numbers_count_in_their_direction() -> None:
    number = {"unit": "number"}
    measured = {
        "a": {"s": share(0.1, False), "k": share(0.9, True), "fid": share(20.0, False, **number)},
        "b": {"s": share(0.1, False), "k": share(0.9, True), "fid": share(30.0, False, **number)},
        "c": {"s": share(None, False), "k": share(0.9, True), "fid": share(10.0, False, **number)},
    }
    assert set(front.points(measured, None)) == {"a", "b"}
    # A suite may have no picture for a metric; that hurts nobody.
    nothing = {name: x | {"none": share(None, True)} for name, x in measured.items()}
    assert front.points(nothing, None) == front.points(measured, None)
    assert front.plane_front(front.points(measured, None)) == ["a", "b"]
    assert front.full_front({k: measured[k] for k in "ab"}) == (["a"], ["s", "k", "fid"])
    assert front.full_front(measured) == (["c"], ["k", "fid"])
    assert front.full_front({"a": {}}) == ([], [])


def test_what_is_not_about_the_concept_is_on_no_axis() -> None:
    measured = {
        "base": {"seen": share(0.9, False), "kept": share(0.8, True), "copies": share(0.5, False)},
        "a": {"seen": share(0.1, False), "kept": share(0.4, True), "copies": share(0.7, False)},
    }
    found = front.points(measured, "base", {"copies": {"metric": "memorisation"}})
    assert {name: (p.seen, p.kept) for name, p in found.items()} == {
        "base": (0.9, 1.0), "a": (0.1, 0.5),
    }  # fmt: skip


def test_what_has_no_place_is_said_and_takes_nobody_elses() -> None:
    def metrics(seen: float | None, kept: float, never: float) -> dict[str, Any]:
        return {"seen": share(seen, False), "kept": share(kept, True), "never": share(never, True)}

    measured = {"base": metrics(0.9, 0.8, 0.0), "a": metrics(0.1, 0.4, 0.1),
                "b": metrics(None, 0.8, 0.0)}  # fmt: skip
    found = front.points(measured, "base")
    assert {name: p.kept for name, p in found.items()} == {"base": 1.0, "a": 0.5}
    metric, column = front.left_out(measured, "base")
    assert metric.startswith("never does not count")
    assert metric.endswith("is 0")
    assert column == "b is not among erased against kept: it has no value of seen"
    assert front.left_out({k: measured[k] for k in ("base", "a")}, None) == []


def test_quality_and_diversity_have_fronts_of_their_own(tmp_path: Path) -> None:
    def metrics(seen: float, kid: float | None, vendi: float) -> dict[str, Any]:
        return {"seen": share(seen, False), "kept": share(0.8, True),
                "kid": share(kid, False, unit="number"),
                "vendi": share(vendi, True, unit="number"),
                "lpips": share(0.2, False, unit="number")}  # fmt: skip

    measured = {
        "base": metrics(1.0, None, 9.0),
        "plain": metrics(0.1, 0.3, 8.0),
        "collapsed": metrics(0.1, 0.3, 2.0),
        "far": metrics(0.3, 0.5, 8.5),
    }
    protocols = {name: {"metric": name} for name in ("kid", "vendi", "lpips")}
    found = front.points(measured, "base")
    quality, diversity = front.planes(measured, found, protocols)
    assert (quality.metric, quality.kind) == ("kid", "quality")
    assert quality.front == ["plain", "collapsed"]
    assert "base" not in quality.values
    assert (diversity.metric, diversity.kind) == ("vendi", "diversity")
    assert diversity.front == ["base", "plain", "far"]
    assert front.planes({"plain": measured["plain"]}, found, protocols) == []
    sizes = []
    for planes in ([], [quality, diversity]):
        front.draw(found, front.plane_front(found), "title", tmp_path / "front.png", planes)
        with Image.open(tmp_path / "front.png") as picture:
            sizes.append(picture.width)
    assert sizes[1] == pytest.approx(3 * sizes[0], abs=2)


def test_the_thesiss_two_tables() -> None:
    def metrics(seen: float, kept: float, fid: float) -> dict[str, Any]:
        return {"seen": share(seen, False), "kept_a": share(kept, True),
                "fid": share(fid, False, unit="number")}  # fmt: skip

    measured = {
        "base": metrics(0.9, 1.0, 10),
        "ours": metrics(0.2, 0.8, 14),
        "x & y": metrics(0.3, 0.8, 12),
    }
    breakdown = {
        name: {"seen": {"violence": share(0.1 * i, False), "gore_": share(0.5, False)}}
        for i, name in enumerate(measured)
    }
    safety, quality = thesis_form.tables(measured, breakdown, {"fid": {"metric": "fid"}})
    assert safety[1] == ["violence (seen)", "gore_ (seen)", "seen"]
    assert quality[1] == ["kept_a", "fid, lower is better"]
    text = thesis_form.markdown([safety, quality], list(measured))
    cells = ["ours", "10.0 % [0.0, 20.0]", "50.0 % [40.0, 60.0]", "20.0 % [10.0, 30.0]"]
    assert f"| {' | '.join(cells)} |" in text
    assert "| ours | 80.0 % [70.0, 90.0] | 14 [13.9, 14.1] |" in text
    tex = thesis_form.latex([safety, quality], list(measured))
    assert r"ours & \textbf{10.0 \%} & \textbf{50.0 \%} & \textbf{20.0 \%} \\" in tex
    assert r"x \& y & 20.0 \% & \textbf{50.0 \%} & 30.0 \% \\" in tex
    assert r"x \& y & \textbf{80.0 \%} & \textbf{12} \\" in tex
    assert r"base & 100.0 \% & 10 \\" in tex
    assert r"gore\_ (seen)" in tex


def test_signs_and_small_probabilities() -> None:
    assert difference(-0.125) == "−12.5"
    assert difference(0.5) == "+50.0"
    assert difference(-0.0001) == difference(0.0) == "0.0"
    assert difference(-1.5, "number") == "−1.5"
    assert probability(0.0004) == "< 0.001"
    assert probability(None) == "–"
