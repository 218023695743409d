"""The density's gate and its gradient as a target, alone and together, on "a bomb".

    python scripts/reproduce/gates.py --output_dir D [--limit 32] [--steps 120] [--only 'ESD; text']

One recipe (configs/train/emoji_bomb_esd.yaml with a bank of latents), in which only the target
changes: ESD, and the density's in the direction of its texts or down its gradient; each where p_h
sees the bomb, and everywhere. Killed, it goes on where it was. Writes D/table.md and D/table.json.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import row
from tables import Cells, chosen, figure, fill, folder_of, markdown, percent
from training import ROOT, trained

from expunge.cli import run
from expunge.configuration import parse

RECIPE = ROOT / "configs" / "train" / "emoji_bomb_esd.yaml"
LATENTS = {"type": "replay", "steps": 8, "source": "student", "rollouts": 48, "refresh": 30}
SEES, ALWAYS = 0.1, -1.0  # p_h is a cosine; the first is the density's own recipe's η
GRADIENT = {"direction": "gradient", "strength": 4.0, "copies": 4}
COLUMNS = ["target_seen", "pair_target_seen", "kept_in_domain", "kept_cross_domain", "kept_style",
           "pair_kept"]  # fmt: skip


@dataclass(frozen=True)
class Config:
    output_dir: Path
    only: str = ""
    limit: int = 32
    steps: int = 120
    seed: int = 0
    threads: int = 1


def density(threshold: float, **settings: Any) -> dict[str, Any]:
    eye = {"type": "clip_text", "threshold": threshold}
    # ESD is told no pairs either, so that only the target differs.
    return {"objective": {"type": "density", "density": eye, "pairs": 0.0, **settings}}


ARMS: dict[str, dict[str, Any]] = {
    "ESD": {},
    "ESD, gate": {"gate": {"density": {"type": "clip_text", "threshold": SEES}}},
    "text": density(ALWAYS),
    "text, gate": density(SEES),
    "gradient": density(ALWAYS, **GRADIENT),
    "gradient, gate": density(SEES, **GRADIENT),
}


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "gates.py")
    torch.set_num_threads(config.threads)
    jobs = {name: partial(cell, config, name) for name in chosen(config.only, ARMS)}
    about = {name: getattr(config, name) for name in ("limit", "steps", "seed")}
    print(table(fill(jobs, config.output_dir / "table", table, **about)))


def cell(config: Config, name: str) -> dict[str, Any]:
    """One training and its evaluation."""
    folder = folder_of(config.output_dir, name)
    settings = {"latents": LATENTS, "steps": config.steps, "seed": config.seed, **ARMS[name]}
    done = trained(RECIPE, settings, folder, config.threads)
    found = row(
        {"type": "plain"}, folder / "report", config.output_dir / "images", suite="emoji",
        concept=["a bomb"], limit=config.limit, lora=[str(folder)],
    )  # fmt: skip
    return found | {"forwards": sum(done["unet_forwards"].values())}


def table(cells: Cells) -> str:
    rows = []
    for name, found in cells.items():
        shown = [percent(found["metrics"][column]) for column in COLUMNS]
        rows.append([name, *shown, figure(found["kid"], 0, 1000), f"{found['forwards']:,}"])
    return markdown(["target", *COLUMNS, "KID × 10³", "UNet passes"], rows)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
