"""The files of an attack: attack.json, attack.png and the printed table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from expunge.eval.age_gate import REASON
from expunge.eval.attacks import Attack
from expunge.eval.attacks.arena import DIVERGED, Arena
from expunge.eval.attacks.rates import best_of, results
from expunge.eval.grid import Cell, Section, contact_sheet
from expunge.eval.reasons import counted
from expunge.pictures import save_png
from expunge.results import provenance, write_json_atomic

SCHEMA_VERSION = 1
FILE = "attack.json"
COLUMNS = 8
NAMES = {"base": "base, no attack", "pre_asr": "erased, no attack", "asr": "erased, attacked"}


def write_report(
    arena: Arena,
    attack: Attack,
    done: Mapping[str, Any],
    settings: Mapping[str, Any],
    generators: Mapping[str, Any],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write attack.png, then attack.json, which says so that the attack is complete.

    Returns:
        What attack.json holds.
    """
    rows = done["rows"]
    tries = [trial for row in rows for trial in row["trials"]]
    said = Counter(trial.get("error") for trial in tries)
    refused = {why: said[why] for why in (REASON, DIVERGED) if said[why]}
    tried = [row for row in rows if row["attacked"]]
    passes = sum(row["passes"] for row in rows) + done["common"]["passes"]
    seconds = sum(row["seconds"] for row in rows) + done["common"]["seconds"]
    report = {
        "schema_version": SCHEMA_VERSION,
        **about,
        "suite_sha256": settings["suite"],
        "cases_sha256": settings["cases"],
        "attack": settings["attack"],
        "access": attack.access,
        "seed": arena.seed,
        "concept": {"texts": settings["concept"], "labels": list(arena.labels)},
        "n": len(rows),
        "attacked": len(tried),
        **measured(attack, rows),
        "refused": refused,
        "cost": {
            "pictures": len(tries) - sum(refused.values()),
            "unet_passes": passes,
            "unet_passes_common": done["common"]["passes"],
            "unet_passes_per_case": round(passes / len(tried)) if tried else 0,
        },
        "unknown": counted(errors(arena, rows)),
        "detector": settings["detector"],
        "generators": dict(generators),
        "rows": rows,
        "provenance": provenance() | {"seconds": round(seconds, 1), "notes": arena.store.notes},
    }
    save_png(_sheet(arena, report), arena.folder / "attack.png")
    write_json_atomic(arena.folder / FILE, report)
    return report


def measured(attack: Attack, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that is counted; it follows from the rows."""
    return {
        "results": {name: m.to_dict() for name, m in results(rows).items()},
        "best_of": [{"tries": k, **m.to_dict()} for k, m in best_of(rows).items()],
        "findings": attack.findings(rows),
    }


def print_table(report: Mapping[str, Any]) -> None:
    """Print the rates and what they cost."""
    title = f"{report['attack']['type']} ({report['access']}), {report['n']} cases"
    if report["smoke"]:
        title += " (smoke run, not comparable)"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("concept is seen on", no_wrap=True)
    table.add_column("share [95 %]", no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("unknown", justify="right")
    for name, text in NAMES.items():
        m = report["results"][name]
        table.add_row(text, shown(m), str(m["n"]), str(m["unknown"]))
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(120, console.width))
    console.print(table)
    cost = report["cost"]
    print(
        f"{report['attacked']} cases attacked: {cost['pictures']} pictures, "
        f"{cost['unet_passes']} UNet passes, {report['provenance']['seconds']:.0f} s"
    )
    if report["unknown"]:
        print(f"unknown, and so neither seen nor not: {report['unknown']}")
    for called, found in (("rows left out", "excluded"), ("tries never drawn", "refused")):
        if report[found]:
            print(f"{called}: {', '.join(f'{n} for {why}' for why, n in report[found].items())}")
    if "back after" in report["findings"]:
        after = report["findings"]["back after"]
        print(f"steps until it is back: {'more than there were' if after is None else after}")


def shown(m: Mapping[str, Any]) -> str:
    """A rate with its interval, in per cent."""
    if m["value"] is None:
        return "–"
    return f"{100 * m['value']:.1f} % [{100 * m['low']:.1f}, {100 * m['high']:.1f}]"


def errors(arena: Arena, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why pictures could not be judged, of all that were made."""
    shots = [shot.error for shot in (*arena.ceiling, *arena.before)]
    # Batches of an attack that was begun by an older version say no reason.
    tried = [trial.get("error") for row in rows for trial in row["trials"]]
    return [error for error in (*shots, *tried) if error is not None]


def _sheet(arena: Arena, report: Mapping[str, Any]) -> Any:
    rows: Sequence[dict[str, Any]] = report["rows"]
    sections = []
    for title, wanted in (("It came back", True), ("It did not", False), ("Unknown", None)):
        part = [row for row in rows if row["attacked"] and row["after"] is wanted]
        if part:
            chosen = part[:COLUMNS]
            sections.append(
                Section(
                    title,
                    f"{len(part)} of {len(rows)} cases",
                    [_caption(row) for row in chosen],
                    {
                        "base": [_cell(arena, row, "base", row["base"]) for row in chosen],
                        "erased": [_cell(arena, row, "before", row["before"]) for row in chosen],
                        "attacked": [_cell(arena, row, "after", row["after"]) for row in chosen],
                    },
                )
            )
    results = report["results"]
    subtitle = ", ".join(f"{text}: {shown(results[name])}" for name, text in NAMES.items())
    name = ", ".join(report["concept"]["texts"])
    return contact_sheet(f"{name}: {report['attack']['type']}", subtitle, sections)


def _caption(row: Mapping[str, Any]) -> str:
    told = row["adversarial"]
    return f"{told['prompt'] if told else row['prompt']}"


def _cell(arena: Arena, row: Mapping[str, Any], which: str, seen: bool | None) -> Cell:
    key = row["pictures"][which]
    # Without the concept is as wanted, but of the base, which shall show it.
    wanted = None if seen is None else seen is (which == "base")
    pixels = arena.store.read(key) if key else None
    return Cell(pixels, wanted, blurred=arena.sexual and seen is not False)
