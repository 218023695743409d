"""Run an attack on cases in batches; every finished batch is kept, so that a kill costs one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from expunge.errors import UserError
from expunge.eval.attacks import Attack, learnt
from expunge.eval.attacks.arena import Arena
from expunge.eval.attacks.rates import either

FILE = "batches.jsonl"


def attack_all(attack: Attack, arena: Arena, at_once: int) -> dict[str, Any]:
    """Look at all cases without attack, then attack those that do not succeed by themselves.

    Args:
        attack: Its settings.
        arena: The model under attack.
        at_once: Cases of a batch; some attacks optimise them together.

    Returns:
        `rows`, one for each case; `passes` and `seconds`, of which `common` are for all cases.
    """
    arena.look()
    chosen = [i for i, shot in enumerate(arena.before) if attack.together or shot.seen is not True]
    done = read_batches(arena.folder / FILE)
    # By case, not by place: a judge that failed before the kill may do so no more, and then other
    # cases are chosen.
    known = {row["case"] for batch in done for row in batch["rows"]}
    if attack.together and known != set(chosen):
        done, known = [], set()
    left = [i for i in chosen if i not in known]
    size = len(chosen) if attack.together else at_once
    parts = [left[start : start + size] for start in range(0, len(left), max(size, 1))]
    if parts:
        begun = time.monotonic()
        attack.prepare(arena)
        prepared = time.monotonic() - begun
        with tqdm(
            total=len(chosen), initial=len(chosen) - len(left), desc="attack", unit="case",
            disable=None,
        ) as bar:  # fmt: skip
            for part in parts:
                begun = time.monotonic()
                attack.run(arena, part)
                seconds = arena.seconds + time.monotonic() - begun
                batch = {
                    "rows": [_attacked(arena, i, seconds / len(part)) for i in part],
                    "common": {"passes": arena.passes.get(None, 0), "seconds": prepared},
                }
                append(arena.folder / FILE, batch)
                done.append(batch)
                bar.update(len(part))
    (arena.folder / learnt.FILE).unlink(missing_ok=True)
    attacked = {row["case"]: row for batch in done for row in batch["rows"]}
    common = [batch["common"] for batch in done]
    rows = [_row(arena, i, attacked.get(i)) for i in range(len(arena.cases))]
    return {
        "rows": rows,
        "common": {
            "passes": max((c["passes"] for c in common), default=0),
            "seconds": round(max((c["seconds"] for c in common), default=0.0), 1),
        },
    }


def read_batches(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; what a kill has torn is cut off.

    Raises:
        UserError: A whole line is no batch.
    """
    if not file.is_file():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with open(file, "r+b") as stream:
            stream.truncate(len(whole))
    try:
        return [_checked(json.loads(line)) for line in whole.splitlines()]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"got {file}, which cannot be read ({error!r}); allowed: what an attack wrote; choose "
            "another --output_dir, or say --overwrite true"
        ) from None


def _checked(batch: Any) -> dict[str, Any]:
    found: dict[str, Any] = batch
    itemgetter("passes", "seconds")(found["common"])
    for row in found["rows"]:
        itemgetter("case", "passes", "seconds")(row)
        for trial in row["trials"]:
            itemgetter("prompt", "said", "picture", "seen")(trial)
    return found


def append(file: Path, batch: dict[str, Any]) -> None:
    """One more line, on the disk when this returns."""
    text = json.dumps(batch, ensure_ascii=False, allow_nan=False) + "\n"
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _attacked(arena: Arena, i: int, seconds: float) -> dict[str, Any]:
    return {
        "case": i,
        "trials": arena.attempts.get(i, []),
        "passes": arena.passes.get(i, 0),
        "seconds": round(seconds, 2),
    }


def _row(arena: Arena, i: int, attacked: dict[str, Any] | None) -> dict[str, Any]:
    """All that is known of a case; `adversarial` is what succeeded, else what was tried last."""
    trials: Sequence[dict[str, Any]] = attacked["trials"] if attacked else []
    told = next((t for t in trials if t["seen"]), trials[-1] if trials else None)
    before = arena.before[i]
    return {
        "case": i,
        "prompt": arena.cases[i].prompt,
        "seed": arena.cases[i].seed,
        **arena.cases[i].sampling.given(),
        "base": arena.ceiling[i].seen,
        "before": before.seen,
        "attacked": attacked is not None,
        "after": either([before.seen, *(t["seen"] for t in trials)]),
        "adversarial": told and {"prompt": told["prompt"], "said": told["said"]},
        "pictures": {
            "base": arena.ceiling[i].picture,
            "before": before.picture,
            "after": told and told["picture"],
        },
        "passes": attacked["passes"] if attacked else 0,
        "seconds": attacked["seconds"] if attacked else 0.0,
        "trials": list(trials),
    }
