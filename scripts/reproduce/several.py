"""Several concepts: adapters trained apart and put together, beside one training for all.

    python scripts/reproduce/several.py --output_dir D [--limit 32] [--seeds 3]

The density on three objects of the bundled model. Rows: each object's own adapter, which was told
to keep the two others; all three loaded together; one training with all targets, of each
`several.order`. Columns: each target seen, by the suite's judge, and what is kept of the base.
Killed, it goes on where it was. Writes D/table.md and D/table.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import row
from tables import Cells, fill, folder_of, markdown
from training import ROOT, trained

from expunge.cli import run
from expunge.concepts import Concept
from expunge.configuration import parse
from expunge.results import wilson

RECIPE = ROOT / "configs" / "train" / "emoji_bomb_density.yaml"
TARGETS = ["a bomb", "a cigarette", "a skull"]
ORDERS = ["random", "joined", "balanced"]
KEPT = ["kept_in_domain", "kept_cross_domain", "kept_style", "pair_kept"]


@dataclass(frozen=True)
class Config:
    output_dir: Path
    limit: int = 32
    seeds: int = 3
    steps: int = 30
    threads: int = 1


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "several.py")
    torch.set_num_threads(config.threads)
    adapters = {target: ([target], "random") for target in TARGETS}
    adapters |= {f"one training, {order}": (TARGETS, order) for order in ORDERS}
    jobs = {}
    for seed in range(config.seeds):
        folders = {name: folder_of(config.output_dir, f"{name}/{seed}") for name in adapters}
        for name, (targets, order) in adapters.items():
            make = partial(erase, config, targets, order, seed, folders[name])
            jobs[f"{name}/{seed}"] = partial(cell, config, f"{name}/{seed}", {folders[name]: make})
        # The adapters themselves are there by then.
        alone = {folders[target]: None for target in TARGETS}
        jobs[f"the three together/{seed}"] = partial(
            cell, config, f"the three together/{seed}", alone
        )
    print(table(fill(jobs, config.output_dir / "table", table, limit=config.limit)))


def erase(config: Config, targets: list[str], order: str, seed: int, folder: Path) -> None:
    """One training."""
    concept = Concept(targets=targets)
    settings = {
        "concept.name": concept.name, "concept.targets": targets, "several.order": order,
        "steps": config.steps, "seed": seed,
    }  # fmt: skip
    trained(RECIPE, settings, folder, config.threads)


def cell(config: Config, name: str, adapters: dict[Path, Any]) -> dict[str, Any]:
    """The suite on what these adapters, made first where need be, are together."""
    for make in adapters.values():
        if make is not None:
            make()
    report = folder_of(config.output_dir / "reports", name)
    found = row(
        {"type": "plain"}, report, config.output_dir / "images", suite="emoji", concept=TARGETS,
        limit=config.limit, lora=[str(folder) for folder in adapters],
    )  # fmt: skip
    answers = [
        (Concept(targets=TARGETS).target_in(case["prompt"]), case["erased"]["answers"])
        for case in json.loads((report / "scores.json").read_text())["rows"]
    ]
    seen = {
        target: [a["target_seen"] for t, a in answers if t == target and "target_seen" in a]
        for target in TARGETS
    }
    return found | {"seen": seen}


def table(cells: Cells) -> str:
    """Rates pooled over seeds; of what is kept, per cent of the base."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, found in cells.items():
        groups.setdefault(name.split("/")[0], []).append(found)
    rows = []
    for name, runs in groups.items():
        line = [name, str(len(runs))]
        for target in TARGETS:
            seen = [answer for x in runs for answer in x["seen"][target]]
            known = [answer for answer in seen if answer is not None]
            low, high = wilson(sum(known), len(known))
            text = f"{100 * sum(known) / len(known):.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            line.append(f"{text} of {len(seen)}")
        for metric in KEPT:
            ours, base = (
                sum((x[kind][metric]["value"] or 0) * x[kind][metric]["n"] for x in runs)
                for kind in ("metrics", "base")
            )
            line.append(f"{100 * ours / base:.1f}" if base else "–")
        rows.append(line)
    header = ["adapter", "runs", *(f"{target} seen" for target in TARGETS)]
    return markdown([*header, "in domain", "cross", "style", "beside it"], rows)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
