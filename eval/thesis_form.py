"""Two tables, methods as rows: safety (what must not be seen) and quality (what must be kept)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from expunge.eval.display import MISSING, both, number
from expunge.eval.runs import BASE

# A metric's columns for what it is about are shown only if they are few.
MOST_ABOUTS = 8
Measured = Mapping[str, Any]
Table = tuple[str, list[str], list[list[Measured | None]]]


def tables(
    measured: Mapping[str, Mapping[str, Measured]],
    breakdown: Mapping[str, Mapping[str, Mapping[str, Measured]]],
    looking: Collection[str],
) -> list[Table]:
    """Title, columns, and a row of measurements for each method.

    Safety is what a detector should not see; what looks at pictures, FID for example, tells of
    their quality in whichever direction.

    Args:
        measured: Method -> metric -> measurement.
        breakdown: Method -> metric -> about -> measurement; methods without are left blank.
        looking: The metrics that look at pictures.
    """
    first = next(iter(measured.values()))
    found: list[Table] = []
    for title, safety in (("Safety, lower is better", True), ("Quality, higher is better", False)):
        columns: list[tuple[str, str | None]] = []
        for name, m in first.items():
            lower = not m["higher_is_better"]
            if (lower and name not in looking) is not safety:
                continue
            abouts = {a: 0 for table in breakdown.values() for a in table.get(name, {})}
            if safety and 1 < len(abouts) <= MOST_ABOUTS:
                columns += [(name, about) for about in abouts]
            columns.append((name, None))
        rows = [
            [
                metrics.get(name)
                if about is None
                else breakdown.get(method, {}).get(name, {}).get(about)
                for name, about in columns
            ]
            for method, metrics in measured.items()
        ]
        names = [
            f"{about} ({name})"
            if about is not None
            else name
            if safety or first[name]["higher_is_better"]
            else f"{name}, lower is better"
            for name, about in columns
        ]
        if names:
            found.append((title, names, rows))
    return found


def markdown(found: Sequence[Table], methods: Sequence[str]) -> str:
    """The tables in Markdown, values with intervals."""
    lines = []
    for title, columns, rows in found:
        lines += [f"| {' | '.join([title, *columns])} |", f"|{'---|' * (len(columns) + 1)}"]
        for method, row in zip(methods, rows, strict=True):
            cells = [MISSING if m is None else both(m) for m in row]
            lines.append(f"| {' | '.join([method, *cells])} |")
        lines.append("")
    return "\n".join(lines)


def latex(found: Sequence[Table], methods: Sequence[str]) -> str:
    """The tables in LaTeX (package booktabs), values alone, the best method of a column in bold."""
    lines = []
    for title, columns, rows in found:
        ours = [row for method, row in zip(methods, rows, strict=True) if method != BASE]
        best = [_best([row[i] for row in ours]) for i in range(len(columns))]
        lines += [f"\\begin{{tabular}}{{l{'r' * len(columns)}}}", "\\toprule"]
        lines += [" & ".join(map(_escape, [title, *columns])) + r" \\", r"\midrule"]
        for method, row in zip(methods, rows, strict=True):
            cells = []
            for m, top in zip(row, best, strict=True):
                text = "--" if m is None or m["value"] is None else _escape(number(m))
                leads = method != BASE and m is not None and m["value"] == top is not None
                cells.append(rf"\textbf{{{text}}}" if leads else text)
            lines.append(" & ".join([_escape(method), *cells]) + r" \\")
        lines += ["\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(lines)


def _best(column: Sequence[Measured | None]) -> float | None:
    known = [m for m in column if m is not None and m["value"] is not None]
    if not known:
        return None
    best: float = (max if known[0]["higher_is_better"] else min)(m["value"] for m in known)
    return best


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: f"\\{c}" for c in "&%$#_{}"}
    return "".join(special.get(c, c) for c in text)
