"""Every way to guard sampling, on the bundled model, in one table.

    python scripts/reproduce/emoji_samplers.py --output_dir D [--limit 24] [--only 'safe; SAFREE']
    python scripts/reproduce/emoji_samplers.py --output_dir D --suite emoji_implied \\
        --concept 'a skull'

Each sampler is one `expunge eval` with a common store of pictures; killed, it goes on where it was.
Writes D/table.md and D/table.json. Beside the suite's metrics: pictures changed among those whose
prompt does not name the concept, KID to the base's pictures of the same prompts (on the judge's
features), CLIP score (of the bundled guide, which steers some of the rows: no verdict), and seconds
a picture as a ratio to plain sampling, run in turn.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import cost, row
from tables import BESIDE, Cells, beside, chosen, figure, fill, folder_of, markdown

import expunge.sampling.calibrate
from expunge.cli import run
from expunge.configuration import parse
from expunge.eval.display import MISSING, both
from expunge.eval.emoji_vocabulary import Vocabulary

CALIBRATION = "calibration.json"  # in the output folder
GRADIENT: dict[str, Any] = {"direction": "gradient", "release": 1.0}
SAMPLERS: dict[str, dict[str, Any]] = {
    "safe": {"type": "safe"},
    "published": {"type": "published"},
    "gradient, normalised": {"type": "safe", "correction": GRADIENT | {"strength": 4.0}},
    "gradient, 8 views": {"type": "safe", "correction": GRADIENT | {"strength": 8.0, "copies": 8}},
    "calibrated": {
        "type": "safe",
        "density": {"type": "calibrated", "density": {"type": "clip_text"}, "file": CALIBRATION},
    },
    "negative prompt": {"type": "negative_prompt"},
    "SLD weak": {"type": "sld", "preset": "weak"},
    "SLD medium": {"type": "sld", "preset": "medium"},
    "SLD strong": {"type": "sld", "preset": "strong"},
    "SLD max": {"type": "sld", "preset": "max"},
    "SAFREE": {"type": "safree"},
    "SAFREE, offset 2": {"type": "safree", "offset": 2.0},
    "negative classifier": {"type": "classifier"},
}


@dataclass(frozen=True)
class Config:
    output_dir: Path
    suite: str = "emoji_guard"
    concept: str = "a bomb"
    only: str = ""
    limit: int | None = None
    rounds: int = 3
    threads: int = 2


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "emoji_samplers.py")
    torch.set_num_threads(config.threads)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    jobs = {name: partial(cell, config, name) for name in chosen(config.only, SAMPLERS)}
    about = {name: getattr(config, name) for name in ("suite", "concept", "limit")}
    print(table(fill(jobs, config.output_dir / "table", table, called="rows", **about)))


def cell(config: Config, name: str) -> dict[str, Any]:
    """One sampler's evaluation, and what it costs."""
    folder, settings, concept = config.output_dir, SAMPLERS[name], [config.concept]
    if name == "calibrated":
        file = folder / CALIBRATION
        settings = settings | {"density": settings["density"] | {"file": str(file)}}
        if not file.exists():
            calibrate(config.concept, file)
    prompts = [config.concept, f"{config.concept} and a key", "a cat face", "a pizza in ink style"]
    return row(
        settings, folder_of(folder, name), folder / "images",
        concept=concept, suite=config.suite, limit=config.limit,
    ) | {"cost": cost(settings, prompts * 2, concept, config.rounds)}  # fmt: skip


def calibrate(concept: str, file: Path) -> None:
    """A reference of 20 pictures of each object of other categories."""
    words = Vocabulary.read()
    (target,) = words.resolve([concept])
    harmful = {words.category_of[name] for name in target.objects}
    prompts = [
        words.phrases[n] for n, category in words.category_of.items() if category not in harmful
    ]
    arguments = ["--concept.targets", json.dumps([concept]), "--output", str(file)]
    for prompt in prompts:
        arguments += ["--prompt", prompt]
    expunge.sampling.calibrate.main([*arguments, "--images_per_prompt", "20", "--seed", "1000000"])


def table(rows: Cells) -> str:
    """The table; the base's own line first. What is kept is said in per cent of it."""
    first = next(iter(rows.values()))
    better = {name: m["higher_is_better"] for name, m in first["metrics"].items()}
    harm, kept = ([name for name in better if better[name] is high] for high in (False, True))
    header = ["sampler", *harm, *kept, *BESIDE, "cost"]
    base = [*(both(first["base"][name]) for name in harm), *["100 %"] * len(kept)]
    lines = [["plain", *base, *[MISSING] * len(BESIDE), "1 ×"]]
    for name, x in rows.items():
        lines.append([
            name, *(both(x["metrics"][metric]) for metric in harm),
            *(f"{figure(x['relative'][metric], 0, 100)} %" for metric in kept),
            *beside(x), f"{x['cost']:.2f} ×",
        ])  # fmt: skip
    return markdown(header, lines)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
