"""compare.html: any number of evaluations in one self-contained page."""

from __future__ import annotations

import math
from typing import Any

from expunge.eval import front
from expunge.eval.comparison import Comparison
from expunge.eval.page import breakdowns, gallery, metric_rows, render, unknowns
from expunge.eval.runs import BASE


def comparison_page(found: Comparison) -> str:
    """The page of a comparison."""
    runs, measured = found.runs(), found.measured()
    models = list(runs)
    report: dict[str, Any] = found.report | {
        "changed": {},
        "relative": {},
        "breakdown": {
            column: run.report["breakdown"].get(key, {}) for column, (run, key) in runs.items()
        },
    }
    rows = [
        (row, {column: run.rows[i][key] for column, (run, key) in runs.items()})
        for i, row in enumerate(found.rows)
    ]
    groups, details, omitted = gallery(
        report, rows, {column: run.store() for column, (run, _) in runs.items()}
    )
    protocols = found.report.get("protocols", {})
    points = front.points(measured, BASE if found.base else None, protocols)
    line = front.plane_front(points) if points else []
    best, counted = front.full_front(measured)
    return render(
        "compare.html.j2",
        comparison=found,
        report=report,
        models=models,
        metrics=metric_rows(report, models, measured),
        breakdowns=breakdowns(report, models),
        several={m.name: len(m.runs) for m in found.methods if len(m.runs) > 1},
        unknown=unknowns(rows, models),
        points=points,
        window=window(points),
        line=line,
        steps=steps([points[name] for name in line]),
        planes=front.planes(measured, points, protocols),
        best=best,
        counted=counted,
        groups=groups,
        details=details,
        omitted=omitted,
        missing=sum(p["source"] is None for g in groups for c in g["cases"] for p in c["pictures"]),
    )


def window(points: dict[str, front.Point]) -> tuple[float, float, float, float]:
    """The part of the plane to draw: left, right, bottom, top, in tenths."""
    if not points:
        return 0.0, 1.0, 0.0, 1.0
    top = max(1.0, *(p.kept for p in points.values()))
    bottom = max(0.0, min(p.kept_interval[0] for p in points.values()))
    return 0.0, 1.0, math.floor(10 * bottom) / 10, math.ceil(10 * top) / 10


def steps(line: list[front.Point]) -> list[tuple[float, float]]:
    """The corners of the front: from the least seen on, up where more is kept."""
    found: list[tuple[float, float]] = []
    for point in sorted(line, key=lambda p: (p.seen, p.kept)):
        if found:
            found.append((point.seen, found[-1][1]))
        found.append((point.seen, point.kept))
    return found
