"""Evaluations that were written, read back: report.json, scores.json and where the pictures are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.errors import UserError
from expunge.eval.cases import Answer
from expunge.eval.store import ImageStore
from expunge.results import sha256_file

REPORT = "report.json"
SCORES = "scores.json"
COST = "cost.json"
BASE = "base"
VALUES = "values"
SCHEMA_VERSION = 1
# What two evaluations must share for their numbers to mean the same, and what it is called.
SAME = {
    "schema_version": "form of their report",
    "suite": "suite",
    "version": "version of their suite",
    "suite_sha256": "settings of their suite",
    "prompts_sha256": "prompts (concept, or --limit)",
    "detector": "judge",
    "judges": "second judges",
    "protocols": "protocols of their metrics",
}


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        folder: Where it was written.
        report: What report.json holds.
        rows: The cases of scores.json, in order.
        images: The folder of its pictures.
    """

    folder: Path
    report: dict[str, Any]
    rows: list[dict[str, Any]]
    images: Path

    @property
    def label(self) -> str:
        """What the evaluated model is called in the files."""
        return next(str(name) for name in self.report["generators"] if name != BASE)

    def store(self) -> ImageStore:
        """Its pictures."""
        return ImageStore(self.images)

    def cost(self) -> dict[str, Any]:
        """What it took, another thing in every run; empty where nobody wrote it."""
        file = self.folder / COST
        found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        return found

    def answers(self, metric: str, model: str | None = None) -> dict[int, Answer]:
        """Place of the case -> answer or number, of all pictures that a metric has one of.

        `metric@judge` is a second opinion's.
        """
        key = model or self.label
        each = (answers_of(row[key]) | row[key].get(VALUES, {}) for row in self.rows)
        return {i: given[metric] for i, given in enumerate(each) if metric in given}

    @property
    def keeps_values(self) -> bool:
        """Whether it says what each picture contributes to metrics that look at pictures."""
        return not self.report.get("protocols") or all(
            VALUES in row[self.label] for row in self.rows
        )


def answers_of(scored: Mapping[str, Any]) -> dict[str, bool | None]:
    """What all judges say of one picture: metric -> answer, `metric@judge` for a second one."""
    found = dict(scored["answers"])
    for judge, theirs in scored.get("judges", {}).items():
        found |= {f"{metric}@{judge}": answer for metric, answer in theirs["answers"].items()}
    return found


def read_run(folder: Path, images: Path | None = None) -> Run:
    """Read an evaluation's folder.

    Args:
        folder: What `expunge eval` wrote.
        images: Where its pictures are; None: where the report says.

    Raises:
        UserError: There is no finished evaluation, or its two files do not belong together.
    """
    report, scores = (_read(folder, name) for name in (REPORT, SCORES))
    for name, found in ((REPORT, report), (SCORES, scores)):
        if found.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"got {folder / name} of form {found.get('schema_version')!r}; allowed: form "
                f"{SCHEMA_VERSION}; evaluate again with this version of expunge"
            )
    try:
        where = folder / report["provenance"].get("images", "images")
        run = Run(folder, report, scores["rows"], images or where)
        for name in report["metrics"]:
            run.answers(name)
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(
            f"got {folder}, whose {REPORT} or {SCORES} lacks {error}; allowed: a folder that "
            "`expunge eval` wrote; evaluate again"
        ) from None
    written = report["provenance"].get("scores_sha256")
    if written is not None and written != sha256_file(folder / SCORES):
        raise UserError(
            f"got {folder}, whose {SCORES} is not the one that its {REPORT} counted; allowed: the "
            "files of one evaluation; run `expunge eval` on that folder again"
        )
    return run


def require_comparable(runs: Sequence[Run]) -> None:
    """Refuse evaluations that asked different things.

    Raises:
        UserError: Suite, version, prompts or judges differ.
    """
    first = runs[0]
    for other in runs[1:]:
        differ = [
            what for key, what in SAME.items() if first.report.get(key) != other.report.get(key)
        ]
        if not differ and _asked(first) != _asked(other):
            differ = ["prompts and seeds"]
        if differ:
            raise UserError(
                f"got {first.folder} and {other.folder}, which differ in the {differ[0]}; allowed: "
                "evaluations of the same suite, prompts and judges; evaluate one of them again"
            )


def _asked(run: Run) -> list[tuple[str, int]]:
    return [(row["prompt"], row["seed"]) for row in run.rows]


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no table")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"broken: {error}"
        raise UserError(
            f"got {folder}, whose {name} cannot be read ({why}); allowed: a folder that `expunge "
            "eval` has finished; check the path, or run it"
        ) from None
    return found
