"""The thesis's experiments (arXiv 2505.08817) and its two tables, safety and quality.

    python scripts/reproduce/thesis.py --output_dir D
    python scripts/reproduce/thesis.py --experiment k --values '[1, 2]' --output_dir D

`all`, the default, runs each and joins them. `single`: one concept in words. `sd_filter`: the
concepts of Stable Diffusion's checker. `multi`: several concepts, K = 1. `threshold`, `strength`,
`k`: sweeps of η, γ, K, with figures. Writes D/EXPERIMENT.md with the two tables, D/EXPERIMENT.json
and a figure of each sweep. Killed, it goes on where it was.

On a model of one's own, with a prompt list of one's own (docs/suites.md), the thesis's constants
(η = 0.23, γ = 75) and its CLIP:

    python scripts/reproduce/thesis.py --experiment single --model CompVis/stable-diffusion-v1-4 \\
        --suite i2p_violence --prompts i2p_benchmark.csv --concept violence --output_dir D

Without --suite the list is judged as the suite `prompts` says (nudity). `sd_filter` and `all` need
--sd_filter as well, the folder of a pipeline that has a safety checker. What is measured is what
the suite asks: a list of harmful prompts has safety alone, and of quality CLIP score and distance
to plain sampling. For the rest run it once more with --suite coco_1k and its list.

Untested: Stable Diffusion's published weights, OpenAI's CLIP, the checker, I2P and a GPU. Tested
are the bundled model and, on the CPU, a tiny random pipeline of SD 1.x's classes with a list of
two picture sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from measure import row
from tables import BESIDE, Cells, beside, fill, markdown

from expunge.backbones import BUNDLED
from expunge.cli import run
from expunge.configuration import parse
from expunge.errors import UserError
from expunge.eval.display import MISSING, both

matplotlib.use("agg")
LETTER = {"threshold": "η", "strength": "γ", "k": "K"}
# Those of one concept first, so that what they share with the base stands once.
EXPERIMENTS = ("single", "sd_filter", "threshold", "strength", "multi", "k")
WEAPONS = ("a bomb", "a dagger", "a sword", "an axe")
Point = tuple[dict[str, Any], Sequence[str]]


@dataclass(frozen=True)
class Config:
    output_dir: Path
    experiment: Literal["all", "single", "sd_filter", "multi", "threshold", "strength", "k"] = "all"
    model: str = "emoji"
    suite: str | None = None  # of the bundled model `emoji`; of a list `prompts`
    prompts: Path | None = None
    clip: str | None = None  # of the bundled model its guide; else the thesis's
    sd_filter: str | None = None  # the checker's folder; None: the bundled guide's filter
    concept: list[str] = field(default_factory=list, metadata={"repeat": True})  # emoji: weapons
    # Of the bundled model what its guide says; else the thesis's, which is of its CLIP.
    threshold: float | None = None
    strength: float = 75.0
    values: list[float] = field(default_factory=list)
    limit: int | None = None
    threads: int = 2

    def __post_init__(self) -> None:
        if self.values and self.experiment not in LETTER:
            raise UserError(
                f"got values for the experiment {self.experiment}; allowed: for a sweep: "
                f"{', '.join(LETTER)}"
            )
        if self.bundled:
            return
        if not self.concept:
            raise UserError(f"got no concept for {self.model}; allowed: one or more; say --concept")
        if not (self.suite or self.prompts):
            raise UserError(
                f"got no prompts for {self.model}; allowed: a suite or a list; say --suite, "
                "--prompts or both"
            )
        if not self.sd_filter and self.experiment in ("all", "sd_filter"):
            raise UserError(
                f"got experiment {self.experiment} on {self.model} without a checker; allowed: the "
                "folder of a pipeline that has one; say --sd_filter, or another --experiment"
            )

    @property
    def bundled(self) -> bool:
        return self.model in BUNDLED

    @property
    def eye(self) -> str:
        return self.clip or ("emoji" if self.bundled else "ViT-B-16/openai")


def published(config: Config, η: float | None, γ: float, k: int = 1, filter_: bool = False) -> Any:
    """The published sampler's settings."""
    density: dict[str, Any] = {"type": "clip_text", "clip": config.eye, "top_k": k, "threshold": η}
    if filter_:
        density = {"type": "sd_filter"} | ({"file": config.sd_filter} if config.sd_filter else {})
    correction = {"direction": "gradient", "scale": "published", "strength": γ}
    correction |= {"start": 0.0, "release": 1.0}
    return {"type": "published", "density": density, "correction": correction}


def points(config: Config, experiment: str) -> dict[str, Point]:
    """Row -> (sampler, concepts under test)."""
    η, γ, many = config.threshold, config.strength, config.concept or WEAPONS
    if η is None and not config.bundled:
        η = 0.23
    one, values = many[:1], config.values
    if experiment == "single":
        return {"Single": (published(config, η, γ), one)}
    if experiment == "sd_filter":
        return {"SD-filter": (published(config, η, γ, filter_=True), one)}
    if experiment == "multi":
        return {"Multi": (published(config, η, γ), many)}
    if experiment == "threshold":
        values = values or [0.2, 0.3, 0.4, 0.5]
        return {f"η = {v:g}": (published(config, v, γ), one) for v in values}
    if experiment == "strength":
        values = values or [γ / 4, γ / 2, γ, 2 * γ, 4 * γ]
        return {f"γ = {v:g}": (published(config, η, v), one) for v in values}
    ks = [int(v) for v in values] or range(1, len(many) + 1)
    return {f"K = {k}": (published(config, η, γ, k), many) for k in ks}


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "thesis.py")
    torch.set_num_threads(config.threads)
    folder, asked = config.output_dir, config.experiment
    folder.mkdir(parents=True, exist_ok=True)
    suite = config.suite or ("prompts" if config.prompts else "emoji")
    labels: dict[str, list[str]] = {}
    jobs = {}
    for name in EXPERIMENTS if asked == "all" else [asked]:
        found = points(config, name)
        labels[name] = list(found)
        for i, (label, (settings, concept)) in enumerate(found.items()):
            jobs[label] = partial(
                row, settings, folder / f"{name}-{i}", folder / "images", concept=list(concept),
                suite=suite, model=config.model, prompts=config.prompts, limit=config.limit,
                clip=config.eye,
            )  # fmt: skip
    rows = fill(jobs, folder / asked, tables, called="rows")
    for name in labels.keys() & LETTER.keys():
        draw({label: rows[label] for label in labels[name]}, LETTER[name], folder / f"{name}.png")
    print(tables(rows))


def tables(rows: Cells) -> str:
    """Safety: what must not be seen. Quality: what must be, and how far it is from plain sampling.

    Plain sampling stands before the first row of its prompts: several concepts have others.
    """
    first = next(iter(rows.values()))
    shares = {n: m for n, m in first["metrics"].items() if m.get("unit", "share") == "share"}
    harm = [name for name, m in shares.items() if not m["higher_is_better"]]
    kept = [name for name in first["metrics"] if name not in harm]
    safety, quality, base = [], [], None
    for label, x in rows.items():
        if x["base"] != base:
            base = x["base"]
            safety.append(["plain", *(both(base[c]) for c in harm), str(x["n"])])
            quality.append(["plain", *(both(base[c]) for c in kept), *[MISSING] * len(BESIDE)])
        measured = x["metrics"]
        safety.append([label, *(both(measured[c]) for c in harm), str(x["n"])])
        quality.append([label, *(both(measured[c]) for c in kept), *beside(x)])
    return "\n".join([
        markdown(["safety, lower is better", *harm, "pictures"], safety),
        markdown(["quality", *(_titled(c, first) for c in kept), *BESIDE], quality),
    ])  # fmt: skip


def _titled(name: str, first: dict[str, Any]) -> str:
    return name if first["metrics"][name]["higher_is_better"] else f"{name}, lower is better"


def draw(rows: Cells, letter: str, file: Path) -> None:
    """Every rate over the swept value, with its interval; dashed: the base's."""
    import matplotlib.pyplot as plt

    x = [float(label.rpartition(" ")[2]) for label in rows]
    first = next(iter(rows.values()))
    figure, sides = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for side, better, title in zip(sides, (False, True), ("safety", "quality"), strict=True):
        for name, m in first["metrics"].items():
            if m["higher_is_better"] is not better or m.get("unit", "share") != "share":
                continue
            # What is unknown becomes NaN, a gap in the line.
            measured = [r["metrics"][name] for r in rows.values()]
            y, low, high = (
                np.array([m[key] for m in measured], float) for key in ("value", "low", "high")
            )
            (line,) = side.plot(x, y, marker="o", markersize=3, label=name)
            side.fill_between(x, low, high, color=line.get_color(), alpha=0.12)
            if (base := first["base"][name]["value"]) is not None:
                side.axhline(base, color=line.get_color(), ls=":", lw=0.8)
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
