"""Erasure against quality: every method a point, and those that no other beats."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from expunge.eval.significance import pareto

# The page's, in its order; the base is gray.
COLOURS = ("#2563a8", "#c2641b", "#2b8a4e", "#8c4fb0", "#b8375f", "#14808a", "#8a6d14")
# What a metric's protocol calls it, and what it tells of pictures besides erasure.
KINDS = dict.fromkeys(("clip_score", "aesthetic", "hps", "fid", "kid", "cmmd"), "quality")
KINDS["vendi"] = "diversity"
ENDS = ("value", "low", "high")
Measured = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A method on the two axes, with 95 % intervals.

    Attributes:
        seen: Mean of the counts of which less is better: how much of the concept is left.
        kept: Mean of the counts of which more is better, each relative to the base's.
        seen_interval: Of the first.
        kept_interval: Of the second.
    """

    seen: float
    kept: float
    seen_interval: tuple[float, float]
    kept_interval: tuple[float, float]


@dataclass(frozen=True)
class Plane:
    """How much is still seen, against one number of the pictures.

    Attributes:
        metric: The number's.
        kind: quality or diversity.
        higher_is_better: Its direction.
        values: Column -> measurement. The base has no distance to itself.
        front: The columns that no other beats in both.
    """

    metric: str
    kind: str
    higher_is_better: bool
    values: Mapping[str, Measured]
    front: list[str]


def points(
    measured: Mapping[str, Mapping[str, Measured]],
    base: str | None,
    looking: Collection[str] = (),
) -> dict[str, Point]:
    """The point of every column that has a value of every share that counts.

    Those are a detector's counts that anybody has a value of: what a metric that looks at pictures
    says, copies or hallucinations, is not about what was erased.

    Args:
        measured: Column -> metric -> measurement.
        base: The column that the shares to be kept are relative to; None: they are as they are.
        looking: The metrics that look at pictures.
    """
    scales, _ = _scales(measured, base, looking)
    found = {}
    for name, metrics in measured.items():
        sides: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
        if _lacking(metrics, scales):
            continue
        for metric, scale in scales.items():
            m = metrics[metric]
            value, low, high = (m[key] / scale for key in ENDS)
            sides[m["higher_is_better"]].append((value, low, high))
        if all(sides.values()):
            seen, kept = mean_interval(sides[False]), mean_interval(sides[True])
            found[name] = Point(seen[0], kept[0], seen[1:], kept[1:])
    return found


def left_out(
    measured: Mapping[str, Mapping[str, Measured]],
    base: str | None,
    looking: Collection[str] = (),
) -> list[str]:
    """Which metrics and columns have no place among the `points`, and why."""
    scales, notes = _scales(measured, base, looking)
    for name, metrics in measured.items():
        if lacking := _lacking(metrics, scales):
            notes.append(
                f"{name} is not among erased against kept: it has no value of {', '.join(lacking)}"
            )
    return notes


def _scales(
    measured: Mapping[str, Mapping[str, Measured]], base: str | None, looking: Collection[str]
) -> tuple[dict[str, float], list[str]]:
    """The shares that count and what each is relative to; why others of them do not count."""
    scales: dict[str, float] = {}
    notes = []
    for name, m in next(iter(measured.values())).items():
        known = any(x[name]["value"] is not None for x in measured.values() if name in x)
        if name in looking or m.get("unit", "share") != "share" or not known:
            continue
        scale = measured[base][name]["value"] if base and m["higher_is_better"] else 1.0
        if scale:
            scales[name] = scale
        else:
            is_ = "not known" if scale is None else "0"
            notes.append(
                f"{name} does not count in erased against kept: the base's, to which it would be "
                f"relative, is {is_}"
            )
    return scales, notes


def _lacking(metrics: Mapping[str, Measured], scales: Mapping[str, float]) -> list[str]:
    return [x for x in scales if any(metrics.get(x, {}).get(key) is None for key in ENDS)]


def mean_interval(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """The mean of M numbers (θ, l, u) and its interval, from theirs (Zou & Donner 2008).

    L = θ̄ − √Σ((θ − l)/M)², U = θ̄ + √Σ((u − θ)/M)² (MOVER, doi:10.1002/sim.3095); it takes the
    numbers for independent, which two metrics of the same pictures are not quite.
    """
    M = len(parts)
    mean = sum(θ for θ, _, _ in parts) / M
    below = math.hypot(*((θ - low) / M for θ, low, _ in parts))
    above = math.hypot(*((high - θ) / M for θ, _, high in parts))
    return mean, mean - below, mean + above


def plane_front(found: Mapping[str, Point]) -> list[str]:
    """Those that no other beats in seen and kept."""
    return pareto({name: (p.seen, p.kept) for name, p in found.items()}, (False, True))


def full_front(
    measured: Mapping[str, Mapping[str, Measured]],
) -> tuple[list[str], list[str]]:
    """Those that no other beats in all metrics, each in its own direction, and which metrics.

    Metrics of which some column has no value do not count.
    """
    first, *others = measured.values()
    names = [
        name
        for name, m in first.items()
        if all(name in x and x[name]["value"] is not None for x in (first, *others))
    ]
    if not names:
        return [], []
    values = {column: [x[name]["value"] for name in names] for column, x in measured.items()}
    return pareto(values, [first[name]["higher_is_better"] for name in names]), names


def planes(
    measured: Mapping[str, Mapping[str, Measured]],
    found: Mapping[str, Point],
    protocols: Mapping[str, Mapping[str, Any]],
) -> list[Plane]:
    """Erasure against each measured number of quality or diversity that two columns or more have.

    Args:
        measured: Column -> metric -> measurement.
        found: The columns' points.
        protocols: Of the metrics that look at pictures.
    """
    planes = []
    for name, protocol in protocols.items():
        kind = KINDS.get(protocol.get("metric", ""))
        values = {
            column: metrics[name]
            for column, metrics in measured.items()
            if column in found and name in metrics and metrics[name]["value"] is not None
        }
        if kind is not None and len(values) > 1:
            higher = next(iter(values.values()))["higher_is_better"]
            sides = {column: (found[column].seen, m["value"]) for column, m in values.items()}
            planes.append(Plane(name, kind, higher, values, pareto(sides, (False, higher))))
    return planes


def draw(
    found: Mapping[str, Point],
    front: Sequence[str],
    title: str,
    file: Path,
    others: Sequence[Plane] = (),
) -> None:
    """Draw the planes: crosses are 95 % intervals, the dashed lines join the fronts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * (1 + len(others)), 4.4), layout="constrained")
    first, *rest = figure.subplots(1, 1 + len(others), squeeze=False)[0]
    first.set_title(title, loc="left", fontsize=10)
    kept = {
        name: (100 * p.kept, 100 * p.kept_interval[0], 100 * p.kept_interval[1])
        for name, p in found.items()
    }
    _panel(first, found, kept, front)
    first.set(ylabel="kept, % of base (more is better)")
    for axes, plane in zip(rest, others, strict=True):
        ends = {
            name: (m["value"], *(m["value"] if m[k] is None else m[k] for k in ("low", "high")))
            for name, m in plane.values.items()
        }
        _panel(axes, found, ends, plane.front)
        better = "more" if plane.higher_is_better else "less"
        axes.set(ylabel=f"{plane.metric} ({better} is better)")
        axes.set_title(plane.kind, loc="left", fontsize=10)
        if not plane.higher_is_better:
            axes.invert_yaxis()
    figure.savefig(file, dpi=150)


def _panel(
    axes: Any,
    found: Mapping[str, Point],
    upwards: Mapping[str, tuple[float, float, float]],
    front: Sequence[str],
) -> None:
    """Points at how much is still seen, across, and at a number with its interval, upwards."""
    line = sorted((100 * found[n].seen, upwards[n][0]) for n in front)
    axes.step(*zip(*line, strict=True), where="post", ls="--", lw=1, color="#9a9da2", zorder=1)
    colours = {"base": "#7d828a"} | dict(zip((n for n in found if n != "base"), cycle(COLOURS)))
    places: dict[tuple[float, float], list[str]] = {}  # names at one place would hide each other
    for name, (y, *y_ends) in upwards.items():
        p = found[name]
        x, x_ends = 100 * p.seen, [100 * end for end in p.seen_interval]
        errors = [[[abs(v - end)] for end in ends] for v, ends in ((x, x_ends), (y, y_ends))]
        colour = colours[name]
        face = "white" if name == "base" else colour
        axes.errorbar(x, y, errors[1], errors[0], "o", color=colour, mfc=face, elinewidth=1)
        places.setdefault((round(x), float(f"{y:.2g}")), []).append(name)
    for place, names in places.items():
        axes.annotate(", ".join(names), place, (6, 6), textcoords="offset points")
    axes.set(xlabel="still seen, % (less is better)")
    axes.spines[["top", "right"]].set_visible(False)
