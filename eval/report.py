"""The files of an evaluation: report.json, scores.json, .md, .html, grid.png, the final table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from expunge.eval.card import model_index
from expunge.eval.cases import Answer, Plan, Seen
from expunge.eval.detectors import protocol_id
from expunge.eval.display import of_base, plain
from expunge.eval.harness import Outcome, Score
from expunge.eval.page import evaluation_page
from expunge.eval.reasons import told
from expunge.eval.runs import SCHEMA_VERSION, Run
from expunge.eval.sheet import evaluation_sheet
from expunge.eval.significance import (
    Paired,
    compare_answers,
    compare_numbers,
    holm,
    ratio_of_answers,
    ratio_of_numbers,
)
from expunge.eval.store import ImageStore
from expunge.eval.suite import Suite
from expunge.pictures import save_png
from expunge.results import (
    Measurement,
    provenance,
    sha256_file,
    sha256_json,
    write_json_atomic,
    write_text_atomic,
)

_STORED_FROM = 0.01


@dataclass(frozen=True)
class Evaluation:
    """Everything that a report tells.

    Attributes:
        suite: The suite.
        plan: The concept under test and the cases.
        smoke: Whether the pictures were limited, so that numbers compare with nothing.
        title: What was evaluated, for people.
        label: What the evaluated model is called beside the base: "erased", or "model".
        outcome: The evaluated model's.
        base: The base model's; None when it was not evaluated.
        detector: The judge's protocol.
        changed: Of each group, the pictures that differ from the base's; empty without a base.
        judges: The protocols of the second opinions.
    """

    suite: Suite
    plan: Plan
    smoke: bool
    title: str
    label: str
    outcome: Outcome
    base: Outcome | None
    detector: dict[str, Any]
    changed: Mapping[str, Measurement] = field(default_factory=dict)
    judges: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def outcomes(self) -> dict[str, Outcome]:
        """The models, base first."""
        base = {"base": self.base} if self.base is not None else {}
        return base | {self.label: self.outcome}

    def relative(self) -> dict[str, float | None]:
        """The share of the base's own value, for every metric of which more is better."""
        if self.base is None:
            return {}
        return {
            name: _ratio(measured.value, self.base.metrics[name].value)
            for name, measured in self.outcome.metrics.items()
            if measured.higher_is_better
        }

    @cached_property
    def relative_intervals(self) -> dict[str, tuple[float, float] | None]:
        """The 95 % intervals of these shares, on the same prompts and seeds.

        None of a number of a whole set, which no single pictures have.
        """
        found = {}
        for name, ratio in self.relative().items():
            share = self.outcome.metrics[name].unit == "share"
            interval: Any = ratio_of_answers if share else ratio_of_numbers
            found[name] = None if ratio is None else interval(*self._paired(name))
        return found

    def _paired(self, name: str) -> tuple[list[Answer], list[Answer], list[str]]:
        """What the base and the model have of the same pictures, and their prompts."""
        base = self.base.answers(name) if self.base is not None else {}
        ours = self.outcome.answers(name)
        both = [i for i in ours if i in base]
        prompts = [self.plan.cases[i].prompt for i in both]
        return [base[i] for i in both], [ours[i] for i in both], prompts

    @cached_property
    def differences(self) -> dict[str, Paired]:
        """Of what single pictures have, erased minus base at the same seeds; p is Holm's."""
        if self.base is None:
            return {}
        found = {}
        for name, measured in self.outcome.metrics.items():
            test: Any = compare_answers if measured.unit == "share" else compare_numbers
            pair = test(*self._paired(name))
            if pair is not None:
                found[name] = pair
        corrected = holm({name: pair.p for name, pair in found.items()})
        return {name: replace(pair, p=corrected[name]) for name, pair in found.items()}

    def metric_id(self, name: str) -> str:
        """A metric's name with all that decides what it says: two ids, two metrics."""
        if name in self.outcome.protocols:
            return f"{name}[{sha256_json(self.outcome.protocols[name])[:12]}]"
        metric, _, judge = name.partition("@")
        return f"{metric}[{protocol_id(self.judges[judge] if judge else self.detector)}]"

    def sheet_title(self) -> str:
        """The concept, in its own words."""
        return f"{', '.join(self.plan.tested.texts)}: {self.title}"


def write_report(evaluation: Evaluation, store: ImageStore, folder: Path) -> dict[str, Any]:
    """Write all files of a report; report.json comes last and so says that it is complete.

    Args:
        evaluation: What to tell.
        store: Where the pictures are.
        folder: Where the files go.

    Returns:
        What report.json holds.
    """
    scores = _scores(evaluation)
    save_png(evaluation_sheet(evaluation, scores["rows"], store), folder / "grid.png")
    write_json_atomic(folder / "scores.json", scores)
    write_text_atomic(folder / "report.md", markdown(evaluation))
    files = {
        "images": os.path.relpath(store.root, folder),
        "scores_sha256": sha256_file(folder / "scores.json"),
    }
    report = to_dict(evaluation) | {"provenance": provenance() | files}
    page = evaluation_page(Run(folder, report, scores["rows"], store.root))
    write_text_atomic(folder / "report.html", page)
    if not evaluation.smoke:
        write_text_atomic(folder / "model-index.yaml", model_index(report))
    write_json_atomic(folder / "report.json", report)
    return report


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """The part of report.json that is the same whenever the same thing is evaluated."""
    suite, plan = evaluation.suite, evaluation.plan
    outcomes = evaluation.outcomes()
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": suite.name,
        "version": suite.version,
        "suite_sha256": suite.sha256(),
        "prompts_sha256": sha256_json([case.told() for case in plan.cases]),
        "sources": dict(plan.sources),
        "unchecked": list(plan.unchecked),
        "excluded": dict(plan.excluded),
        "smoke": evaluation.smoke,
        "sexual": suite.prompts.sexual,
        "title": evaluation.title,
        "concept": {"texts": list(plan.tested.texts), "labels": list(plan.tested.labels)},
        "groups": dict(suite.groups),
        "meanings": {name: metric.meaning for name, metric in suite.metrics.items()},
        "metrics": {
            name: {"id": evaluation.metric_id(name)} | m.to_dict()
            for name, m in evaluation.outcome.metrics.items()
        },
        "base": _measurements(evaluation.base.metrics) if evaluation.base else None,
        "relative": evaluation.relative(),
        "relative_intervals": evaluation.relative_intervals,
        "differences": {name: asdict(pair) for name, pair in evaluation.differences.items()},
        "changed": _measurements(evaluation.changed),
        "breakdown": {
            model: {name: _measurements(rows) for name, rows in outcome.breakdown.items()}
            for model, outcome in outcomes.items()
        },
        "detector": evaluation.detector,
        "judges": dict(evaluation.judges),
        "protocols": evaluation.outcome.protocols,
        "generators": {model: outcome.identity for model, outcome in outcomes.items()},
    }


def markdown(evaluation: Evaluation) -> str:
    """report.md."""
    suite, plan, outcomes = evaluation.suite, evaluation.plan, evaluation.outcomes()
    lines = [f"# {evaluation.sheet_title()}", ""]
    if evaluation.smoke:
        lines += ["**Smoke run with `--limit`: these numbers compare with nothing.**", ""]
    lines += [
        f"Suite `{suite.name}` version {suite.version}, {len(evaluation.plan.cases)} pictures per "
        f"model, {suite.steps} steps, guidance {suite.guidance_scale:g}, judged by "
        f"`{evaluation.detector.get('detector', 'a detector')}` "
        f"(`{str(evaluation.detector.get('weights', ''))[:12]}`). "
        f"Brackets are 95 % intervals: {_intervals(evaluation)}.",
        *(f"{line[0].upper()}{line[1:]}." for line in plan.read()),
        *(f"**Left out: {n} rows for {why}.**" for why, n in plan.excluded.items()),
        "",
    ]
    header = ["metric", "good is", *outcomes, *(["of base"] if evaluation.base else []), "n"]
    lines += [_row(header), _row(["---"] * len(header))]
    lines += [_row(cells) for cells in _table(evaluation, code=True)]
    lines += _differences(evaluation)
    unknown = told(evaluation.outcomes())
    if unknown:
        lines += ["", *(f"- **unknown**: {line}" for line in unknown)]
    lines += _breakdown(evaluation)
    if evaluation.changed:
        lines += ["", "## Pictures that differ from the base's by a bit or more", ""]
        lines += [_row(["group", "differ", "n"]), _row(["---"] * 3)]
        for group, measured in evaluation.changed.items():
            title = suite.groups.get(group, group)
            lines.append(_row([title, _shown(measured), str(measured.n)]))
    lines += ["", "## What the metrics mean", ""]
    lines += [f"- `{name}`: {metric.meaning}." for name, metric in suite.metrics.items()]
    lines += ["", "![base and erased at the same seeds](grid.png)", ""]
    return "\n".join(lines)


def _intervals(evaluation: Evaluation) -> str:
    rates = "of rates Wilson's, pictures of one prompt counting as what they are worth together"
    if not evaluation.outcome.protocols:
        return rates
    return (
        f"{rates}; of metrics that look at pictures, by prompt: of shares the same, of means a "
        "bootstrap's, of numbers of a whole set a jackknife's"
    )


def print_table(evaluation: Evaluation) -> None:
    """Print the table to stdout."""
    title = evaluation.sheet_title() + (" (smoke run, not comparable)" if evaluation.smoke else "")
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("metric", no_wrap=True)
    table.add_column("good is")
    for model in evaluation.outcomes():
        table.add_column(model, no_wrap=True)
    if evaluation.base:
        table.add_column("of base", justify="right")
    table.add_column("n", justify="right")
    for cells in _table(evaluation):
        table.add_row(*cells)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(120, console.width))
    console.print(table)
    for line in told(evaluation.outcomes()):
        console.print(f"unknown: {line}", style="yellow", markup=False)
    for line in evaluation.plan.read():
        console.print(line, style="dim", markup=False, soft_wrap=True)


def _table(evaluation: Evaluation, code: bool = False) -> list[list[str]]:
    relative, intervals = evaluation.relative(), evaluation.relative_intervals
    rows = []
    for name, measured in evaluation.outcome.metrics.items():
        cells = [f"`{name}`" if code else name, "high" if measured.higher_is_better else "low"]
        cells += [_shown(outcome.metrics[name]) for outcome in evaluation.outcomes().values()]
        if evaluation.base:
            cells.append(of_base(relative[name], intervals[name]) if name in relative else "")
        rows.append([*cells, str(measured.n)])
    return rows


def _breakdown(evaluation: Evaluation) -> list[str]:
    """Of the suite's first group, which is what should be gone, every metric in parts."""
    outcomes, first = evaluation.outcomes(), next(iter(evaluation.suite.groups))
    cases = [c for c in evaluation.plan.cases if c.group == first and c.questions]
    if len({about for c in cases for about in c.about}) < 2:
        return []
    lines = ["", "## Each target", ""]
    if any(len(c.about) > 1 for c in cases):
        lines += ["A picture that is about several counts in the row of each.", ""]
    for name in {q.metric: 0 for c in cases for q in c.questions}:
        header = [f"`{name}`", *outcomes, "n"]
        lines += [_row(header), _row(["---"] * len(header))]
        for about, measured in evaluation.outcome.breakdown[name].items():
            cells = [_shown(outcome.breakdown[name][about]) for outcome in outcomes.values()]
            lines.append(_row([about, *cells, str(measured.n)]))
    return lines


def _differences(evaluation: Evaluation) -> list[str]:
    found = evaluation.differences
    if not found:
        return []
    header = ["metric", f"{evaluation.label} − base", "p (Holm)", "pairs"]
    lines = [
        "",
        "On the same prompts and seeds. Shares, in percentage points: McNemar's exact test, or "
        "where prompts repeat a permutation of whole prompts; intervals of Bonett and Price. Other "
        "numbers: that permutation, and a bootstrap of the pairs by prompt.",
        "",
        _row(header),
        _row(["---"] * len(header)),
    ]
    for name, x in found.items():
        share = evaluation.outcome.metrics[name].unit == "share"
        ends = (x.difference, x.low, x.high)
        size, low, high = (f"{100 * v:+.1f}" if share else f"{v:+.4g}" for v in ends)
        points = f"{size} [{low}, {high}]"
        lines.append(_row([f"`{name}`", points, f"{x.p:.2g}", str(x.n)]))
    return lines


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    rows = []
    for i, case in enumerate(evaluation.plan.cases):
        models = {}
        for model, outcome in evaluation.outcomes().items():
            models[model] = _score(outcome.scores[i])
            judges = {name: _score(scores[i]) for name, scores in outcome.judged.items()}
            if judges:
                models[model]["judges"] = judges
            if outcome.protocols:
                each = {name: x[i] for name, x in outcome.values.items() if i in x}
                models[model]["values"] = each
            failed = {name: why[i] for name, why in outcome.failures.items() if i in why}
            if failed:
                models[model]["metric_errors"] = failed
        rows.append(case.told() | models)
    return {"schema_version": SCHEMA_VERSION, "rows": rows}


def _score(score: Score) -> dict[str, Any]:
    seen = None
    if score.seen is not None:
        # Most labels of most pictures are at zero, and would be most of the file.
        seen = {k: round(v, 4) for k, v in score.seen.items() if v >= _STORED_FROM}
    found: dict[str, Any] = {"picture": score.picture, "answers": score.answers, "scores": seen}
    if isinstance(score.seen, Seen):
        found["details"] = score.seen.details
    return found if score.error is None else found | {"error": score.error}


def _measurements(measured: Mapping[str, Measurement]) -> dict[str, Any]:
    return {name: m.to_dict() for name, m in measured.items()}


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _shown(measured: Measurement) -> str:
    if measured.value is None:
        return "–"
    unknown = f" ({measured.unknown} unknown)" if measured.unknown else ""
    share = measured.unit == "share"
    value = plain(measured.value) if share else f"{measured.value:.4g}"
    if measured.low is None or measured.high is None:
        return value + unknown
    ends = (f"{100 * x:.1f}" if share else f"{x:.4g}" for x in (measured.low, measured.high))
    return f"{value} [{', '.join(ends)}]{unknown}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
