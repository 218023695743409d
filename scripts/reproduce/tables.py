"""Tables of cells: each cell is a run of its own, and a killed table goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from expunge.errors import UserError
from expunge.eval.display import MISSING, plain
from expunge.results import provenance, write_json_atomic, write_text_atomic

Cells = dict[str, dict[str, Any]]


def chosen(asked: str, known: Iterable[str]) -> list[str]:
    """The names in ``a; b``, or all.

    Raises:
        UserError: One is not known.
    """
    known = list(known)
    names = [name.strip() for name in asked.split(";") if name.strip()] or known
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"got {unknown[0]!r}; allowed: {'; '.join(known)}")
    return names


def folder_of(root: Path, name: str) -> Path:
    """Where a cell is kept."""
    return root / name.replace(", ", "_").replace(" ", "_")


def fill(
    jobs: Mapping[str, Callable[[], dict[str, Any]]],
    file: Path,
    table: Callable[[Cells], str],
    *,
    called: str = "cells",
    **about: Any,
) -> Cells:
    """One cell after the other; the table is written with each, and keeps what else was in it.

    Args:
        jobs: Name -> what makes the cell, or reads it again where it is there.
        file: The table without its suffix; .json and .md are written.
        table: Its Markdown.
        called: What the .json calls the cells.
        about: What else it says.

    Returns:
        All that are in the table now.

    Raises:
        UserError: There is no job, or the table has other cells, of other settings.
    """
    if not jobs:
        raise UserError("got no cell that is there; allowed: one or more; leave out --present")
    cells, said = written(file.with_suffix(".json"), called)
    if cells.keys() <= jobs.keys():
        cells = {}
    else:
        require_same(file.with_suffix(".json"), said | about, about | said)
    for name, make in jobs.items():
        cells[name] = make()
        found = {called: cells, **about, "provenance": provenance()}
        write_json_atomic(file.with_suffix(".json"), found)
        write_text_atomic(file.with_suffix(".md"), table(cells))
    return cells


def written(file: Path, called: str) -> tuple[Cells, dict[str, Any]]:
    """The cells of a table that may be there, and what else it says of them.

    Raises:
        UserError: It cannot be read.
    """
    if not file.is_file():
        return {}, {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        cells = dict(found.pop(called))
        found.pop("provenance")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"got a table {file} that cannot be read ({error!r}); allowed: one that this script "
            "wrote; remove it"
        ) from None
    return cells, found


def require_same(cell: Path, found: Any, wanted: Any) -> None:
    """Refuse a cell of other settings.

    Raises:
        UserError: What it was made with is not what is wanted.
    """
    if found != wanted:
        raise UserError(
            f"got {cell} that was made with other settings than today's; allowed: cells of "
            "the same settings in one table; remove it, or choose another output_dir"
        )


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(cells)} |" for cells in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"


def figure(value: float | None, digits: int, times: float = 1) -> str:
    """A number in so many digits after the point, or that there is none."""
    return MISSING if value is None else f"{times * value:.{digits}f}"


BESIDE = ["benign changed", "KID × 10³", "CLIP score"]


def beside(row: dict[str, Any]) -> list[str]:
    """The columns `BESIDE` of a row of `measure.row`."""
    changed, unknown = row["benign_changed"], row["unknown"]
    kid = figure(row["kid"], 2, 1000) + (f" ({unknown} unknown)" if unknown else "")
    return [plain(changed), kid, figure(row["clip_score"], 3)]


def percent(m: dict[str, Any]) -> str:
    """A rate with its interval, per cent without the sign, and what is unknown."""
    if m["value"] is None:
        return f"– ({m['unknown']} unknown)"
    text = f"{100 * m['value']:.1f} [{100 * m['low']:.1f}, {100 * m['high']:.1f}]"
    return f"{text} ({m['unknown']} unknown)" if m["unknown"] else text
