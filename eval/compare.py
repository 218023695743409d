"""`expunge compare D1 D2 …`: evaluations beside each other, on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expunge.configuration import parse
from expunge.errors import UserError
from expunge.results import (
    fresh_output_dir,
    provenance,
    write_json_atomic,
    write_text_atomic,
)

if TYPE_CHECKING:
    from expunge.eval.comparison import Comparison, Method

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class CompareConfig:
    """What `expunge compare` is told."""

    output_dir: Path = field(metadata={"help": "where the comparison goes"})
    runs: list[str] = field(
        metadata={
            "help": "evaluations: FOLDER, NAME=FOLDER, or NAME=FOLDER,FOLDER for trainings that "
            "differ in their seed; the word --runs may be left out at the start",
            "repeat": True,
        }
    )
    store: Path | None = field(
        default=None, metadata={"help": "where all pictures are; default: where each report says"}
    )
    form: Literal["plain", "thesis"] = field(
        default="plain",
        metadata={"help": "thesis: also its two tables, methods as rows, Markdown and LaTeX"},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "empty an output folder that holds earlier results"}
    )


def main(argv: list[str]) -> None:
    """Run `expunge compare`."""
    words = argv[: next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))]
    rest = argv[len(words) :]
    run(parse(CompareConfig, ["--runs", *words, *rest] if words else rest, "expunge compare"))


def run(config: CompareConfig) -> dict[str, Any]:
    """Compare evaluations; write compare.json, .md, .html and pareto.png, and print the table.

    Returns:
        What compare.json holds.

    Raises:
        UserError: An evaluation is missing, or asked something else than the others.
    """
    from expunge.eval import front
    from expunge.eval.comparison import compare
    from expunge.eval.comparison_page import comparison_page

    methods = _methods(config)
    found = compare(methods)
    _refuse_own_input(config, methods)
    folder = fresh_output_dir(config.output_dir, config.overwrite)
    measured = found.measured()
    protocols = found.report.get("protocols", {})
    points = front.points(measured, "base" if found.base else None, protocols)
    if points:
        title = f"Suite {found.report['suite']} {found.report['version']}"
        title += ", smoke run: not comparable" if found.report["smoke"] else ""
        planes = front.planes(measured, points, protocols)
        front.draw(points, front.plane_front(points), title, folder / "pareto.png", planes)
    files = {"compare.md": markdown(found), "compare.html": comparison_page(found)}
    if config.form == "thesis":
        files |= _thesis(found)
    for name, text in files.items():
        write_text_atomic(folder / name, text)
    result = to_dict(found) | {"provenance": provenance()}
    write_json_atomic(folder / "compare.json", result)
    print(files["compare.md"])
    pictures = ["pareto.png"] if points else []
    print(f"{folder}: {', '.join(['compare.json', *files, *pictures])}")
    return result


def to_dict(found: Comparison) -> dict[str, Any]:
    """What compare.json holds besides its provenance."""
    from expunge.eval import front
    from expunge.eval.runs import SAME

    measured = found.measured()
    protocols = found.report.get("protocols", {})
    points = front.points(measured, "base" if found.base else None, protocols)
    best, counted = front.full_front(measured)
    return {
        "schema_version": SCHEMA_VERSION,
        "of": {key: found.report.get(key) for key in SAME},
        "smoke": any(run.report["smoke"] for m in found.methods for run in m.runs),
        "notes": list(found.notes),
        "methods": {
            method.name: {
                "folders": [str(run.folder) for run in method.runs],
                "titles": [run.report["title"] for run in method.runs],
                "generators": [run.report["generators"][run.label] for run in method.runs],
                "metrics": method.metrics(),
            }
            for method in found.methods
        },
        "base": found.base.report["base"] if found.base else None,
        "differences": [difference.to_dict() for difference in found.differences],
        "tests": found.tests,
        "pareto": {
            "points": {name: asdict(point) for name, point in points.items()},
            "front": front.plane_front(points) if points else [],
            "planes": {
                plane.metric: {"kind": plane.kind, "front": plane.front}
                for plane in front.planes(measured, points, protocols)
            },
            "metrics": counted,
            "front_of_all_metrics": best,
        },
    }


def markdown(found: Comparison) -> str:
    """compare.md."""
    from expunge.eval import front
    from expunge.eval.display import both, difference, probability

    measured, report = found.measured(), found.report
    lines = [f"# {', '.join(report['concept']['texts'])}: {len(found.methods)} compared", ""]
    lines += [f"**Note**: {note}.\n" for note in found.notes]
    lines += [
        f"Suite `{report['suite']}` version {report['version']}; the same prompts, seeds and "
        "judges. Brackets are 95 % intervals.",
        "",
    ]
    lines += [_row(["metric", "good is", *measured]), _row(["---"] * (2 + len(measured)))]
    for name, m in report["metrics"].items():
        cells = [both(x[name]) if name in x else "–" for x in measured.values()]
        lines.append(_row([f"`{name}`", "high" if m["higher_is_better"] else "low", *cells]))
    if found.differences:
        lines += ["", "## Differences on the same pictures", ""]
        lines += [
            f"Shares in percentage points, other numbers by a paired bootstrap and permutation of "
            f"prompts; {found.tests} p-values corrected together (Holm). Pairs with an unknown "
            "answer are left out.",
            "",
        ]
        head = ["of", "against", "metric", "difference", "p", "p (Holm)", "pairs", "unknown"]
        lines += [_row(head), _row(["---"] * len(head))]
    for d in found.differences:
        size = "–"
        if d.paired:
            low, high = difference(d.paired.low, d.unit), difference(d.paired.high, d.unit)
            size = f"{difference(d.paired.difference, d.unit)} [{low}, {high}]"
        p, n = (d.paired.p, d.paired.n) if d.paired else (None, 0)
        cells = [d.of, d.against, f"`{d.metric}`", size, probability(p), probability(d.p_holm)]
        lines.append(_row([*cells, str(n), str(d.unknown)]))
    protocols = report.get("protocols", {})
    points = front.points(measured, "base" if found.base else None, protocols)
    if points:
        lines += ["", "## Erased against kept", ""]
        lines.append(f"No other beats: {', '.join(front.plane_front(points))}.")
        for plane in front.planes(measured, points, protocols):
            names = ", ".join(plane.front)
            lines.append(f"In erasure and {plane.kind} (`{plane.metric}`): {names}.")
        best, counted = front.full_front(measured)
        lines.append(f"In all {len(counted)} metrics at once: {', '.join(best)}.")
        lines += ["", "![erased against kept](pareto.png)"]
    return "\n".join([*lines, ""])


def _thesis(found: Comparison) -> dict[str, str]:
    from expunge.eval import thesis_form

    measured = found.measured()
    breakdown = {
        column: run.report["breakdown"].get(key, {}) for column, (run, key) in found.runs().items()
    }
    several = {method.name for method in found.methods if len(method.runs) > 1}
    tables = thesis_form.tables(
        measured,
        {name: rows for name, rows in breakdown.items() if name not in several},
        found.report.get("protocols", {}),
    )
    return {
        "thesis.md": thesis_form.markdown(tables, list(measured)),
        "thesis.tex": thesis_form.latex(tables, list(measured)),
    }


def _methods(config: CompareConfig) -> list[Method]:
    from expunge.eval.comparison import Method
    from expunge.eval.runs import read_run, require_comparable

    named = [_named(word) for word in config.runs]
    if not named:
        raise UserError(
            "got no evaluation; allowed: folders that `expunge eval` wrote; say for example "
            "expunge compare out/a out/b --output_dir out/compared"
        )
    parts = [(name, [read_run(folder, config.store) for folder in fs]) for name, fs in named]
    require_comparable([run for _, runs in parts for run in runs])
    titles = [name or runs[0].report["title"] for name, runs in parts]
    names = _distinct([name for name, _ in parts], titles, [fs for _, fs in named])
    return [Method(name, tuple(runs)) for name, (_, runs) in zip(names, parts, strict=True)]


def _named(word: str) -> tuple[str, list[Path]]:
    """NAME=FOLDER,FOLDER or FOLDER; a folder may hold `=` and `,` in its own name."""
    if Path(word).is_dir():
        return "", [Path(word)]
    name, equals, folders = word.partition("=")
    if not equals:
        return "", [Path(word)]
    found = [Path(folders)] if Path(folders).is_dir() else list(map(Path, folders.split(",")))
    if not name or "" in folders.split(","):
        raise UserError(
            f"got {word!r}; allowed: FOLDER, NAME=FOLDER or NAME=FOLDER,FOLDER; write it so"
        )
    return name, found


def _distinct(
    given: Sequence[str], titles: Sequence[str], folders: Sequence[Sequence[Path]]
) -> list[str]:
    """A name for each: what was given, else the title, else as much of the path as it takes."""
    names = list(titles)
    for i, name in enumerate(titles):
        if not given[i] and titles.count(name) > 1:
            parts = [f[0].resolve().parts for f in folders]
            depth = next(
                (k for k in range(1, len(parts[i])) if _alone(i, [p[-k:] for p in parts])), 1
            )
            names[i] = "/".join(parts[i][-depth:])
    if repeated := [name for name in names if names.count(name) > 1 or name == "base"]:
        raise UserError(
            f"got two evaluations called {repeated[0]}; allowed: a name of its own for each, but "
            f"not base; say for example {repeated[0]}2=FOLDER"
        )
    return names


def _alone(i: int, tails: Sequence[Any]) -> bool:
    return tails.count(tails[i]) == 1


def _refuse_own_input(config: CompareConfig, methods: Sequence[Method]) -> None:
    target = config.output_dir.resolve()
    for method in methods:
        for run in method.runs:
            if target in (folder := run.folder.resolve(), *folder.parents):
                raise UserError(
                    f"got output folder {config.output_dir}, which holds the evaluation "
                    f"{run.folder}; allowed: another folder; choose another --output_dir"
                )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
