"""Why pictures are unknown, as reports tell it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expunge.eval.harness import Outcome

MISSING = "the picture is missing or damaged"
LONGEST = 200
# What differs from machine to machine and from run to run: folders, and places in memory.
_FOLDERS = re.compile(
    r"""(?<![\w.:/])(?:[A-Za-z]:)?[\\/](?:[^\s\\/'",:;()]+[\\/])*(?=[^\s\\/'",:;()])"""
)
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")


def reason(error: Exception) -> str:
    """The exception's type and the first line of its message, at most 200 characters.

    Of a path only the last name is left, so that it is the same wherever it is run.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = _ADDRESS.sub("0x…", _FOLDERS.sub("…/", lines[0])) if lines else ""
    whole = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 1]}…"


def told(outcomes: Mapping[str, Outcome]) -> list[str]:
    """One line for each model and each judge or metric to which pictures of it are unknown."""
    lines = []
    for model, outcome in outcomes.items():
        for judge, scores in {"": outcome.scores, **outcome.judged}.items():
            failed = [score.error for score in scores if score.error is not None]
            if failed:
                by = f" by {judge}" if judge else ""
                lines.append(
                    f"{len(failed)} of {len(scores)} pictures of {model} could not be judged{by}; "
                    f"the intervals cover whatever they show ({counted(failed)})"
                )
        for metric, why in outcome.failures.items():
            if why:
                lines.append(
                    f"{len(why)} pictures of {model} could not be taken into {metric}, which is "
                    f"measured on the others alone ({counted(why.values())})"
                )
    return lines


def counted(failed: Iterable[str]) -> str:
    """Each reason and how often it was, the most frequent first."""
    return "; ".join(f"{count} × {why}" for why, count in Counter(failed).most_common())
