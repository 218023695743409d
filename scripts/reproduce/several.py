"""Several concepts: adapters trained apart and put together, beside one training for all.

    python scripts/reproduce/several.py --output_dir D [--limit 32] [--seeds 3]

The density on three objects of the bundled model. Rows: each object's own adapter, which was told
to keep the two others; all three loaded together; one training with all targets, of each
`several.order`, all with a bank made anew every `--refresh` batches, since `balanced` takes effect
only then. Columns: each target seen, by the suite's judge, and what is kept of the base. Killed, it
goes on where it was. Writes D/table.md and D/table.json.
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
from tables import Cells, chosen, fill, folder_of, markdown, percent
from training import ROOT, trained

from expunge.cli import run
from expunge.concepts import Concept
from expunge.configuration import parse
from expunge.eval.attacks.rates import rate

RECIPE = ROOT / "configs" / "train" / "emoji_bomb_density.yaml"
TARGETS = ["a bomb", "a cigarette", "a skull"]
KEPT = ["kept_in_domain", "kept_cross_domain", "kept_style", "pair_kept"]
TOGETHER = "the three together"
# What an adapter is called -> its targets, and whose turn it is.
ADAPTERS = {target: ([target], "random") for target in TARGETS} | {
    f"one training, {order}": (TARGETS, order) for order in ("random", "joined", "balanced")
}


@dataclass(frozen=True)
class Config:
    output_dir: Path
    only: str = ""
    limit: int = 32
    seeds: int = 3
    steps: int = 30
    rollouts: int = 84
    refresh: int = 10
    threads: int = 1


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "several.py")
    torch.set_num_threads(config.threads)
    rows = chosen(config.only, [*ADAPTERS, TOGETHER])
    jobs = {
        f"{name}/{seed}": partial(cell, config, name, seed)
        for seed in range(config.seeds)
        for name in rows
    }
    about = {name: getattr(config, name) for name in ("limit", "steps", "rollouts", "refresh")}
    print(table(fill(jobs, config.output_dir / "table", table, **about)))


def erased(config: Config, name: str, seed: int) -> Path:
    """Train an adapter that is not there yet; its folder."""
    targets, order = ADAPTERS[name]
    folder = folder_of(config.output_dir, f"{name}/{seed}")
    settings = {
        "concept.name": name, "concept.targets": targets, "several.order": order,
        "latents.rollouts": config.rollouts, "steps": config.steps, "seed": seed,
    }  # fmt: skip
    if len(targets) > 1:
        settings["latents.refresh"] = config.refresh
    trained(RECIPE, settings, folder, config.threads)
    return folder


def cell(config: Config, name: str, seed: int) -> dict[str, Any]:
    """The suite, of all three targets, on one adapter or on three together."""
    adapters = [erased(config, each, seed) for each in (TARGETS if name == TOGETHER else [name])]
    report = folder_of(config.output_dir / "reports", f"{name}/{seed}")
    found = row(
        {"type": "plain"}, report, config.output_dir / "images", suite="emoji", concept=TARGETS,
        limit=config.limit, lora=[str(folder) for folder in adapters],
    )  # fmt: skip
    concept, seen = Concept(targets=TARGETS), {target: [] for target in TARGETS}
    for case in json.loads((report / "scores.json").read_text())["rows"]:
        if "target_seen" in case["erased"]["answers"]:
            target = concept.target_in(case["prompt"])
            seen[target].append((case["erased"]["answers"]["target_seen"], case["prompt"]))
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
            shots = [shot for x in runs for shot in x["seen"][target]]
            found = rate([seen for seen, _ in shots], [prompt for _, prompt in shots])
            line.append(f"{percent(found.to_dict())} of {len(shots)}")
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
