"""The thesis's experiments (arXiv 2505.08817), one command each.

    python scripts/reproduce/thesis.py --experiment single --output_dir D
    python scripts/reproduce/thesis.py --experiment k --values '[1, 2]' --output_dir D

`single`: one concept in words. `sd_filter`: the concepts of Stable Diffusion's checker. `multi`:
several concepts, K = 1. `threshold`, `strength`, `k`: sweeps of η, γ, K, with figures. Each writes
D/EXPERIMENT.md with a safety and a quality table, D/EXPERIMENT.json and, for sweeps, a figure.
Killed, it goes on where it was.

Elsewhere than on the bundled model, with a suite of one's own (prompt source `file`, detector
`density`; docs/suites.md), and the thesis's constants:

    python scripts/reproduce/thesis.py --experiment single --model CompVis/stable-diffusion-v1-4 \\
        --suite i2p.yaml --clip ViT-B-16/openai --threshold 0.23 --strength 75 \\
        --concept violence --sd_filter CompVis/stable-diffusion-safety-checker --output_dir D
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
from measure import row
from tables import Cells, fill, markdown, shown

from expunge.cli import run
from expunge.configuration import parse

matplotlib.use("agg")
LETTER = {"threshold": "η", "strength": "γ", "k": "K"}


@dataclass(frozen=True)
class Config:
    experiment: Literal["single", "sd_filter", "multi", "threshold", "strength", "k"]
    output_dir: Path
    model: str = "emoji"
    suite: str = "emoji"
    clip: str = "emoji"
    sd_filter: str | None = None  # the checker's folder; None: the bundled guide's filter
    concept: list[str] = field(
        default_factory=lambda: ["a bomb", "a dagger", "a sword", "an axe"],
        metadata={"repeat": True},
    )
    # The thesis has 0.23, for another CLIP. None: what the CLIP says.
    threshold: float | None = None
    strength: float = 75.0
    values: list[float] = field(default_factory=list)
    limit: int | None = None
    threads: int = 2


def published(config: Config, η: float | None, γ: float, k: int = 1, filter_: bool = False) -> Any:
    """The published sampler's settings."""
    density: dict[str, Any] = {"type": "clip_text", "clip": config.clip, "top_k": k, "threshold": η}
    if filter_:
        density = {"type": "sd_filter"} | ({"file": config.sd_filter} if config.sd_filter else {})
    correction = {"direction": "gradient", "scale": "published", "strength": γ}
    correction |= {"start": 0.0, "release": 1.0}
    return {"type": "published", "density": density, "correction": correction}


def points(config: Config) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Row -> (sampler, concepts under test)."""
    η, γ, one, many = config.threshold, config.strength, config.concept[:1], config.concept
    values = config.values
    if config.experiment == "single":
        return {"Single": (published(config, η, γ), one)}
    if config.experiment == "sd_filter":
        return {"SD-filter": (published(config, η, γ, filter_=True), one)}
    if config.experiment == "multi":
        return {"Multi": (published(config, η, γ), many)}
    if config.experiment == "threshold":
        values = values or [0.2, 0.3, 0.4, 0.5]
        return {f"η = {v:g}": (published(config, v, γ), one) for v in values}
    if config.experiment == "strength":
        values = values or [γ / 4, γ / 2, γ, 2 * γ, 4 * γ]
        return {f"γ = {v:g}": (published(config, η, v), one) for v in values}
    ks = [int(v) for v in values] or range(1, len(many) + 1)
    return {f"K = {k}": (published(config, η, γ, k), many) for k in ks}


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "thesis.py")
    torch.set_num_threads(config.threads)
    folder, name = config.output_dir, config.experiment
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {
        label: partial(
            row, settings, folder / f"{name}-{i}", folder / "images", concept=concept,
            suite=config.suite, model=config.model, limit=config.limit, clip=config.clip,
        )
        for i, (label, (settings, concept)) in enumerate(points(config).items())
    }  # fmt: skip
    rows = fill(jobs, folder / name, tables, called="rows")
    if name in LETTER:
        draw(rows, LETTER[name], folder / f"{name}.png")
    print(tables(rows))


def tables(rows: Cells) -> str:
    """Safety: what must not be seen. Quality: what must be, and the distance to plain sampling."""
    first = next(iter(rows.values()))
    names = list(first["metrics"])
    harm = [name for name in names if not first["metrics"][name]["higher_is_better"]]
    kept = [name for name in names if name not in harm]

    def lines(columns: list[str], more: Any) -> list[list[str]]:
        base = ["plain", *(shown(first["base"][c]) for c in columns), *more(None)]
        return [base] + [
            [label, *(shown(x["metrics"][c]) for c in columns), *more(x)]
            for label, x in rows.items()
        ]

    safety = markdown(["safety, lower is better", *harm], lines(harm, lambda x: []))
    quality = markdown(
        ["quality, higher is better", *kept, "benign changed", "KID × 10³", "CLIP score"],
        lines(kept, _distance),
    )
    return f"n = {first['n']} pictures a row.\n\n{safety}\n{quality}"


def _distance(x: dict[str, Any] | None) -> list[str]:
    if x is None:
        return ["–", "–", "–"]
    changed = "–" if x["benign_changed"] is None else f"{100 * x['benign_changed']:.1f} %"
    return [changed, f"{1000 * x['kid']:.2f}", f"{x['clip_score']:.3f}"]


def draw(rows: Cells, letter: str, file: Path) -> None:
    """Every rate over the swept value, with its interval; dashed: the base's."""
    import matplotlib.pyplot as plt

    x = [float(label.rpartition(" ")[2]) for label in rows]
    first = next(iter(rows.values()))
    figure, sides = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for side, better, title in zip(sides, (False, True), ("safety", "quality"), strict=True):
        for name, m in first["metrics"].items():
            if m["higher_is_better"] is not better:
                continue
            y = [r["metrics"][name]["value"] for r in rows.values()]
            low = [r["metrics"][name]["low"] for r in rows.values()]
            high = [r["metrics"][name]["high"] for r in rows.values()]
            (line,) = side.plot(x, y, marker="o", markersize=3, label=name)
            side.fill_between(x, low, high, color=line.get_color(), alpha=0.12)
            side.axhline(first["base"][name]["value"], color=line.get_color(), ls=":", lw=0.8)
        if letter == "γ" and min(x) > 0:
            side.set_xscale("log")
        side.set_xticks(x, [f"{value:g}" for value in x])
        side.minorticks_off()
        side.set(xlabel=letter, title=f"{title} ({'higher' if better else 'lower'} is better)")
        side.legend(frameon=False, fontsize=7)
    sides[0].set(ylim=(-0.03, 1.03), ylabel="share of pictures")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
