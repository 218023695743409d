"""One self-contained HTML page of an evaluation: it opens offline and asks nobody for anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from expunge.eval import display
from expunge.eval.runs import BASE, Run, answers_of
from expunge.eval.store import ImageStore
from expunge.eval.thumbnails import data_uri
from expunge.results import sha256_json

# Pictures in a page, and the bytes that all of them may take.
PICTURES = 800
PICTURE_BYTES = 10_000_000
SCORES_SHOWN = 8
WANTED, UNWANTED, UNKNOWN, UNASKED = "wanted", "unwanted", "unknown", "unasked"
SAMPLING = ("guidance_scale", "height", "width")
FAILED = (UNWANTED, UNKNOWN)

Scored = Mapping[str, Any]
Row = Mapping[str, Any]


def evaluation_page(run: Run) -> str:
    """The page of one evaluation, the base beside it where there is one."""
    report = run.report
    models = [*([BASE] if report["base"] else []), run.label]
    measured = {run.label: report["metrics"]} | ({BASE: report["base"]} if report["base"] else {})
    stores = {model: run.store() for model in models}
    rows = [(row, {model: row[model] for model in models}) for row in run.rows]
    groups, details, omitted = gallery(report, rows, stores)
    return render(
        "report.html.j2",
        report=report,
        models=models,
        metrics=metric_rows(report, models, measured),
        breakdowns=breakdowns(report, models),
        unknown=unknowns(rows, models),
        groups=groups,
        details=details,
        omitted=omitted,
        costs=costs(run.cost(), models),
        originals=report["provenance"].get("images", "images"),
    )


def render(template: str, **context: Any) -> str:
    """Fill a template of this folder."""
    return _environment().get_template(template).render(**context)


def metric_rows(
    report: Mapping[str, Any],
    models: Sequence[str],
    measured: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """What the table of metrics shows: one row for each metric that every model has.

    Args:
        report: Any of the evaluations, for meanings and directions.
        models: The columns.
        measured: Model -> metric -> measurement.
    """
    found = []
    for name, first in report["metrics"].items():
        if any(name not in measured[model] for model in models):
            continue
        cells = {model: measured[model][name] for model in models}
        plain, _, judge = name.partition("@")
        found.append({
            "name": name,
            "meaning": report.get("meanings", {}).get(plain, ""),
            "judge": judge,
            "higher": first["higher_is_better"],
            "unit": first.get("unit", "share"),
            "cells": cells,
            "scale": scale(cells.values()),
            "relative": _of_base(report, name),
        })  # fmt: skip
    return found


def _of_base(report: Mapping[str, Any], name: str) -> dict[str, float | None] | None:
    """What is kept of the base's own; reports of before have no interval."""
    value = report["relative"].get(name)
    low, high = report.get("relative_intervals", {}).get(name) or (None, None)
    return None if value is None else {"value": value, "low": low, "high": high}


def breakdowns(report: Mapping[str, Any], models: Sequence[str]) -> list[dict[str, Any]]:
    """Every metric for each target, object or style, where there are several."""
    tables = {model: report["breakdown"].get(model, {}) for model in models}
    found = []
    for name, first in tables[models[-1]].items():
        if len(first) > 1 and all(name in tables[model] for model in models):
            rows = [
                {"about": about, "cells": {model: tables[model][name][about] for model in models}}
                for about in first
            ]
            found.append({"name": name, "rows": rows})
    return found


def scale(measured: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """The ends of the axis on which these are drawn: of shares 0 and 1."""
    cells = list(measured)
    if all(m.get("unit", "share") == "share" for m in cells):
        return 0.0, 1.0
    ends = [m[key] for m in cells for key in ("value", "low", "high") if m[key] is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    return (low, high) if high > low else (low - 1, high + 1)


def unknowns(
    rows: Sequence[tuple[Row, Mapping[str, Scored]]], models: Sequence[str]
) -> list[dict[str, Any]]:
    """The pictures that are unknown to a judge or metric: model -> each reason -> how many."""
    found: dict[tuple[str, str], list[str]] = {}
    for row, scored in rows:
        for model in models:
            for error in errors_of(scored[model]):
                found.setdefault((model, error), []).append(row["prompt"])
    return [
        {"model": model, "error": error, "count": len(prompts), "prompts": prompts[:5]}
        for (model, error), prompts in found.items()
    ]


def errors_of(scored: Scored) -> list[str]:
    """Why judges or metrics could do nothing with a picture; empty when all could."""
    found = [scored["error"]] if scored.get("error") else []
    for judge, theirs in scored.get("judges", {}).items():
        found += [f"{judge}: {theirs['error']}"] if theirs.get("error") else []
    found += [f"{metric}: {error}" for metric, error in scored.get("metric_errors", {}).items()]
    return found


def costs(cost: Mapping[str, Any], models: Sequence[str]) -> list[dict[str, Any]]:
    """What was made and what took how many seconds: one row for each thing, a cell for a model.

    Args:
        cost: What cost.json holds; empty where there is none.
        models: The columns.
    """
    made, seconds = (
        {m: cost.get(key, {}).get(m) for m in models} for key in ("generated", "seconds")
    )
    if None in (*made.values(), *seconds.values()):
        return []
    found = {"pictures made": {m: str(made[m]) for m in models}}
    found["seconds of making"] = {m: f"{seconds[m].get('generate', 0):.1f}" for m in models}
    found["seconds a picture"] = {
        m: display.plain(seconds[m].get("generate", 0) / made[m] if made[m] else None, "number")
        for m in models
    }
    for step in dict.fromkeys(step for m in models for step in seconds[m] if step != "generate"):
        found[f"seconds of {step}"] = {m: f"{seconds[m].get(step, 0):.1f}" for m in models}
    return [{"what": what, "cells": cells} for what, cells in found.items()]


def gallery(
    report: Mapping[str, Any],
    rows: Sequence[tuple[Row, Mapping[str, Scored]]],
    stores: Mapping[str, ImageStore],
) -> tuple[list[dict[str, Any]], dict[int, Any], int]:
    """The contact sheets of all groups, what a click on a case tells, and the cases left out.

    Args:
        report: For titles and directions.
        rows: Each case, and each model's picture of it with its scores.
        stores: Where each model's pictures are.
    """
    higher = {name: m["higher_is_better"] for name, m in report["metrics"].items()}
    titles, sexual = report.get("groups", {}), report.get("sexual", False)
    names = [group for group in titles if any(row["group"] == group for row, _ in rows)]
    names += [g for g in dict.fromkeys(row["group"] for row, _ in rows) if g not in names]
    allowed = max(1, PICTURES // max(1, len(stores) * len(names)))
    bytes_each = PICTURE_BYTES // max(1, min(PICTURES, len(rows) * len(stores)))
    groups, details, shown = [], {}, 0
    for group in names:
        places = [i for i, (row, _) in enumerate(rows) if row["group"] == group]
        cases = []
        for i in _chosen(rows, places, higher, allowed):
            row, scored = rows[i]
            cases.append(_case(i, row, scored, higher, stores, bytes_each, sexual))
            details[i] = _details(row, scored)
        shown += len(cases)
        groups.append({
            "name": group,
            "title": titles.get(group, group),
            "of": len(places),
            "cases": cases,
            "changed": report.get("changed", {}).get(group),
            "asks": [name for name in higher if any(
                name in answers_of(s) for i in places for s in rows[i][1].values())],
        })  # fmt: skip
    return groups, details, len(rows) - shown


def verdict(answers: Mapping[str, bool | None], higher: Mapping[str, bool]) -> str:
    """Whether a picture is as wanted; what could not be judged is never said to be."""
    wrong = [a is not None and a != higher[name] for name, a in answers.items()]
    if any(wrong):
        return UNWANTED
    if None in answers.values():
        return UNKNOWN
    return WANTED if answers else UNASKED


def flagged(
    answers: Mapping[str, bool | None], higher: Mapping[str, bool], sexual: bool = False
) -> bool:
    """Whether a picture shows what should be gone, or may: it stays blurred until one asks.

    Where prompts may be sexual, a picture that nobody was asked about may show anything.
    """
    shown = [answer is not False for name, answer in answers.items() if not higher[name]]
    return any(shown) or (sexual and not shown)


def _chosen(
    rows: Sequence[tuple[Row, Mapping[str, Scored]]],
    places: Sequence[int],
    higher: Mapping[str, bool],
    at_most: int,
) -> list[int]:
    """The cases of a group that a page has room for: half of it for those that failed."""
    if len(places) <= at_most:
        return list(places)

    def drawn(i: int) -> str:
        return sha256_json([rows[i][0]["prompt"], rows[i][0]["seed"]])

    def failed(i: int) -> bool:
        *_, last = rows[i][1].values()
        return verdict(answers_of(last), higher) in FAILED

    first = sorted(filter(failed, places), key=drawn)[: at_most // 2]
    rest = sorted(set(places) - set(first), key=drawn)[: at_most - len(first)]
    return sorted([*first, *rest])


def _case(
    i: int,
    row: Row,
    scored: Mapping[str, Scored],
    higher: Mapping[str, bool],
    stores: Mapping[str, ImageStore],
    bytes_each: int,
    sexual: bool,
) -> dict[str, Any]:
    pictures = []
    for model, score in scored.items():
        answers = answers_of(score)
        pixels = stores[model].read(score["picture"])
        pictures.append({
            "model": model,
            "source": None if pixels is None else data_uri(pixels, bytes_each),
            "size": None if pixels is None else (pixels.shape[1], pixels.shape[0]),
            "verdict": verdict(answers, higher),
            "flagged": flagged(answers, higher, sexual),
        })  # fmt: skip
    failed = [p["model"] for p in pictures if p["verdict"] in FAILED]
    unknown = [p["model"] for p in pictures if p["verdict"] == UNKNOWN]
    return {"id": i, "row": row, "pictures": pictures, "failed": failed, "unknown": unknown}


def _details(row: Row, scored: Mapping[str, Scored]) -> dict[str, Any]:
    asked = [
        {"metric": q["metric"], "need": need, "labels": q[need]}
        for q in row["expected"]
        for need in ("any", "all")
        if need in q
    ]
    return {
        "prompt": row["prompt"],
        "seed": str(row["seed"]),  # a browser's numbers end at 2^53
        "group": row["group"],
        "about": row["about"],
        "sampling": {key: row[key] for key in SAMPLING if key in row},
        "expected": asked,
        "models": {model: _opinion(score) for model, score in scored.items()},
    }


def _opinion(scored: Scored) -> dict[str, Any]:
    scores = scored.get("scores") or {}
    top = sorted(scores.items(), key=lambda item: -item[1])[:SCORES_SHOWN]
    return {
        "picture": scored["picture"],
        "answers": answers_of(scored),
        "values": scored.get("values", {}),
        "top": top,
        "details": scored.get("details"),
        "errors": errors_of(scored),
    }


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("expunge.eval", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.filters |= {
        "number": display.number,
        "interval": display.interval,
        "plain": display.plain,
        "difference": display.difference,
        "probability": display.probability,
    }
    return environment
