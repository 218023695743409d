"""Erasure against quality: every method a point, and those that no other beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from expunge.eval.significance import pareto

# The page's, in its order; the base is gray.
COLOURS = ("#2563a8", "#c2641b", "#2b8a4e", "#8c4fb0", "#b8375f", "#14808a", "#8a6d14")
Measured = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A method on the two axes, with 95 % intervals.

    Attributes:
        seen: Mean of the shares of which less is better: how much of the concept is left.
        kept: Mean of the shares of which more is better, each relative to the base's.
        seen_interval: Of the first.
        kept_interval: Of the second.
    """

    seen: float
    kept: float
    seen_interval: tuple[float, float]
    kept_interval: tuple[float, float]


def points(measured: Mapping[str, Mapping[str, Measured]], base: str | None) -> dict[str, Point]:
    """The point of every column that has a value of every share that anybody has a value of.

    Args:
        measured: Column -> metric -> measurement.
        base: The column that the shares to be kept are relative to; None: they are as they are.
    """
    found = {}
    empty = {
        metric
        for metric in next(iter(measured.values()))
        if all(x[metric]["value"] is None for x in measured.values() if metric in x)
    }
    for name, metrics in measured.items():
        sides: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
        for metric, m in metrics.items():
            if m.get("unit", "share") != "share" or metric in empty:
                continue
            scale = measured[base][metric]["value"] if base and m["higher_is_better"] else 1.0
            ends = [m[key] for key in ("value", "low", "high")]
            if None in ends or not scale:
                break
            value, low, high = (x / scale for x in ends)
            sides[m["higher_is_better"]].append((value, low, high))
        else:
            if sides[False] and sides[True]:
                seen, kept = mean_interval(sides[False]), mean_interval(sides[True])
                found[name] = Point(seen[0], kept[0], seen[1:], kept[1:])
    return found


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


def draw(found: Mapping[str, Point], front: Sequence[str], title: str, file: Path) -> None:
    """Draw the plane: crosses are 95 % intervals, the dashed line joins the front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    line = sorted((100 * found[n].seen, 100 * found[n].kept) for n in front)
    axes.step(*zip(*line, strict=True), where="post", ls="--", lw=1, color="#9a9da2", zorder=1)
    colours = {"base": "#7d828a"} | dict(zip((n for n in found if n != "base"), cycle(COLOURS)))
    places: dict[tuple[int, int], list[str]] = {}  # names at one place would hide each other
    for name, p in found.items():
        x, y = 100 * p.seen, 100 * p.kept
        errors = [[[100 * abs(v - e)] for e in ends] for v, ends in
                  ((p.seen, p.seen_interval), (p.kept, p.kept_interval))]  # fmt: skip
        colour = colours[name]
        face = "white" if name == "base" else colour
        axes.errorbar(x, y, errors[1], errors[0], "o", color=colour, mfc=face, elinewidth=1)
        places.setdefault((round(x), round(y)), []).append(name)
    for place, names in places.items():
        axes.annotate(", ".join(names), place, (6, 6), textcoords="offset points")
    axes.set(xlabel="still seen, % (less is better)", ylabel="kept, % of base (more is better)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
