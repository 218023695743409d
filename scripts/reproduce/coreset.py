"""Does a coreset keep more than as many latents drawn at random?

    python scripts/reproduce/coreset.py --output_dir D [--sizes '[8, 32]'] [--seeds 3]

ESD on the bundled model, held to few retained latents: those of the coreset, as many drawn at
random from the same bank, or all of the bank. What counts is how far the erased model's predictions
have moved on prompts and noise that no training saw: mean of ‖ε_θ − ε‖² over every other object and
eight noise levels. Writes D/coreset.json and prints a table.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from tables import markdown, require_same

from expunge import backbones
from expunge.cli import run
from expunge.conditioning import condition
from expunge.configuration import parse
from expunge.eval.emoji_vocabulary import Vocabulary
from expunge.results import provenance, write_json_atomic
from expunge.sampling.load import load_erased
from expunge.train import latents
from expunge.train.config import TrainConfig, Validation
from expunge.train.predictions import Inputs, Networks
from expunge.train.train_erase import train

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "train" / "emoji_bomb_esd.yaml"
ARMS = ("coreset", "random", "all")


@dataclass(frozen=True)
class Config:
    output_dir: Path
    sizes: list[int] = field(default_factory=lambda: [8, 32])
    seeds: int = 3
    steps: int = 40
    rollouts: int = 64
    threads: int = 1


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "coreset.py")
    torch.set_num_threads(config.threads)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    file = config.output_dir / "coreset.json"
    found: dict[str, float] = {}
    settings = {"steps": config.steps, "rollouts": config.rollouts}
    if file.exists():
        done = json.loads(file.read_text())
        require_same(file, done.get("settings"), settings)
        found = done["moved"]
    held_out = HeldOut()
    arms = [("all", 0)] + [(arm, n) for n in config.sizes for arm in ARMS[:2]]
    for seed in range(config.seeds):
        for arm, n in arms:
            name = f"{arm}/{n}/{seed}"
            if name not in found:
                found[name] = held_out.moved(erased(config, arm, n, seed))
                write_json_atomic(
                    file, {"moved": found, "settings": settings, "provenance": provenance()}
                )
    print(table(found, arms, config.seeds))


def erased(config: Config, arm: str, n: int, seed: int) -> Path:
    """Train one arm; the folder of its LoRA."""
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = parse(TrainConfig, ["--config", str(CONFIG), "--output_dir", "unused"])
    how = latents.Replay(
        steps=8,
        source="teacher",
        rollouts=config.rollouts,
        refresh=10**6,
        coreset=0 if arm == "all" else n,
    )
    kept = replace(recipe.preserve, weight=1.0, batch_size=4, pairs=0.0, neighbours=0)
    folder = config.output_dir / f"{arm}-{n}-{seed}"
    choose = latents.choose
    if arm == "random":
        latents.choose = partial(at_random, seed=seed)
    try:
        train(
            replace(
                recipe, output_dir=str(folder), latents=how, preserve=kept, seed=seed,
                steps=config.steps, batch_size=4, checkpoint_every=0, overwrite=folder.exists(),
                validation=Validation(prompts=["a bomb"], seeds=1, steps=1),
            )
        )  # fmt: skip
    finally:
        latents.choose = choose
    return folder


def at_random(g: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """As many latents as a coreset has, all alike; others for every seed."""
    w = torch.zeros(len(g))
    w[torch.randperm(len(g), generator=torch.Generator().manual_seed(seed))[:size]] = 1.0
    return w / w.sum()


class HeldOut:
    """Prompts and latents that no training saw, and what the base says of them."""

    def __init__(self) -> None:
        base, words = backbones.load_pipeline("emoji"), Vocabulary.read()
        others = [phrase for name, phrase in words.phrases.items() if name != "bomb"]
        prompts = [
            f"{phrase} in {words.styles[i % len(words.styles)]} style"
            for i, phrase in enumerate(others)
        ]
        networks = Networks(base.unet, base.unet, base.scheduler, None, [])
        how = latents.Rollout(steps=8, source="student")  # the base itself: it has no adapter
        noise = torch.randn(
            len(prompts), *backbones.latent_shape(base),
            generator=torch.Generator().manual_seed(424242),
        )  # fmt: skip
        told, null = condition(base, prompts), condition(base, [""])
        with torch.no_grad():
            states = list(
                latents.trajectory(
                    how, networks, latents.ddim(base.scheduler, 8), noise, told, null, 8
                )
            )
        self.inputs = [Inputs(state.before, state.t, told) for state in states]
        self.base = [state.e for state in states]

    @torch.no_grad()
    def moved(self, lora: Path) -> float:
        """Mean of ‖ε_θ − ε‖²."""
        pipeline = load_erased("emoji", [str(lora)])
        networks = Networks(pipeline.unet, pipeline.unet, pipeline.scheduler, None, [])
        distances = [
            (networks.epsilon("student_sg", x) - e).square().mean()
            for x, e in zip(self.inputs, self.base, strict=True)
        ]
        return float(torch.stack(distances).mean())


def table(found: dict[str, float], arms: list[tuple[str, int]], seeds: int) -> str:
    """Means over seeds, each seed's own, and the ratio to as many at random."""
    rows: list[list[Any]] = []
    for arm, n in arms:
        values = [found[f"{arm}/{n}/{seed}"] for seed in range(seeds)]
        ratio = "–"
        if arm == "coreset":
            ratios = [v / found[f"random/{n}/{seed}"] for seed, v in enumerate(values)]
            ratio = ", ".join(f"{x:.2f}" for x in ratios)
        each = ", ".join(f"{1000 * v:.2f}" for v in values)
        rows.append([arm, str(n or "all"), f"{1000 * statistics.mean(values):.2f}", each, ratio])
    header = ["arm", "latents", "moved × 10³", "of each seed", "ratio to random, of each seed"]
    return markdown(header, rows)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
