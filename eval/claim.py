"""Whose results an output folder holds.

`run.json` says what was asked for and which models there were, so that the same command goes on
where it was and another is refused before anything is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from expunge.errors import UserError
from expunge.results import MARKER, fresh_output_dir, is_temporary, write_json_atomic

RUN = "run.json"


def refuse_another(folder: Path, overwrite: bool, settings: dict[str, Any], kind: str) -> None:
    """Take a new folder, or that of the same run, or with `overwrite` of any of its kind.

    Args:
        folder: The output folder.
        overwrite: Whether it may be emptied.
        settings: What makes two runs the same, as far as it is known before a model is loaded.
        kind: "evaluation" or "attack".

    Raises:
        UserError: The folder holds something else.
    """
    fresh_output_dir(folder, overwrite, not overwrite, dry_run=True)
    content = [item for item in folder.iterdir() if item.name != MARKER] if folder.is_dir() else []
    if all(map(is_temporary, content)):
        return
    other = UserError(
        f"got output folder {folder}, which holds results that are no {kind}; allowed: a "
        "new or an empty folder; choose another --output_dir"
    )
    # A training's folder carries the marker too, and must not be emptied for a report.
    if not (folder / RUN).is_file():
        raise other
    try:
        found = _read(folder)
    except UserError:
        # Nobody can tell any more whose it was; whoever says so may have it.
        if overwrite:
            return
        raise
    if found.get("kind", kind) != kind:
        raise other
    if overwrite:
        return
    known, told = found["settings"], json.loads(json.dumps(settings))  # tuples are lists there
    changed = [key for key in told if known.get(key) != told[key]]
    # The list follows from concept and limit too; only if it alone is another does it say more.
    changed = [key for key in changed if key != "prompt list"] or changed
    if changed:
        raise UserError(
            f"got output folder {folder}, which holds an {kind} with another "
            f"{' and '.join(changed)}; allowed: the same one (it resumes) or a new folder; choose "
            "another --output_dir, or say --overwrite true"
        )


def claim(
    folder: Path, settings: dict[str, Any], kind: str, name: str, identity: dict[str, Any]
) -> None:
    """Write down whose results the folder holds; refuse a model that has changed since.

    Args:
        folder: The output folder.
        settings: As for `refuse_another`.
        kind: "evaluation" or "attack".
        name: Which of the run's models this is.
        identity: What its pictures depend on.

    Raises:
        UserError: The model of this name was another.
    """
    fresh: dict[str, Any] = {"kind": kind, "settings": settings, "generators": {}}
    run = _read(folder) if (folder / RUN).is_file() else fresh
    known = run["generators"].setdefault(name, identity)
    if known != identity:
        changed = [key for key in identity if known.get(key) != identity[key]]
        raise UserError(
            f"got output folder {folder}, which holds an {kind} of another {name} model "
            f"({', '.join(changed)} changed); choose another --output_dir, or say --overwrite true"
        )
    write_json_atomic(folder / RUN, run)


def _read(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if not isinstance(found["settings"], dict) or not isinstance(found["generators"], dict):
            raise ValueError("it holds no run")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"got output folder {folder}, whose {RUN} cannot be read ({error!r}); choose another "
            "--output_dir, or say --overwrite true"
        ) from None
    return found
