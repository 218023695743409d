"""What erasing costs: our recipe and the published one, to the same quality, in one process.

    python scripts/bench/train.py [--output_dir D] [--limit 64] [--looks 5]

Each trains on the bundled model to its last step, while a probe of the suite `emoji` looks, `looks`
times, whether the target is in at most 5 % of its pictures and everything else in at least 95 % of
what the base shows; the cost is that of the first look that finds it so, else of all steps. `limit`
is how many pictures of each group it sees: of 24, one is 4 %, and 95 cannot be told from 91. With
--steps both recipes stop there, to try the script. The last line is
JSON: `forwards_ratio` and `seconds_ratio` are ours over the published one's, `forwards_per_step`
ours per sample of the batch over the whole recipe (a backward counts 2). With --output_dir a figure
of target seen against passes, D/curve.png, and D/curve.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from expunge.cli import run
from expunge.configuration import parse
from expunge.eval.probe import Probe
from expunge.results import provenance, write_json_atomic
from expunge.train.config import TrainConfig, Validation
from expunge.train.train_erase import train

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "train"
RECIPES = {"published": "emoji_bomb_esd_published.yaml", "ours": "emoji_bomb_density.yaml"}
SHEET = Validation(prompts=["a bomb"], seeds=1, steps=1)


@dataclass(frozen=True)
class Config:
    output_dir: Path | None = None
    limit: int = 64
    looks: int = 5
    steps: int | None = None
    threads: int = 1
    erased: float = 0.05
    kept: float = 0.95


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "train.py")
    torch.set_num_threads(config.threads)
    found = {name: trained(file, config) for name, file in RECIPES.items()}
    ours, published = found["ours"], found["published"]
    if config.output_dir is not None:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_json_atomic(config.output_dir / "curve.json", found | {"provenance": provenance()})
        plot(found, config.output_dir / "curve.png")
    summary = {
        "forwards_ratio": ours["forwards"] / published["forwards"],
        "seconds_ratio": ours["seconds"] / published["seconds"],
        "forwards_per_step": ours["per_sample"],
        **{f"{name}_{key}": x[key] for name, x in found.items()
           for key in ("reached", "steps", "forwards", "seconds", "whole_forwards")},
        "limit": config.limit, "looks": config.looks, "threads": config.threads,
    }  # fmt: skip
    print(json.dumps(summary))


def trained(file: str, config: Config) -> dict[str, Any]:
    """One recipe, until it is good enough."""
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = parse(TrainConfig, ["--config", str(CONFIGS / file), "--output_dir", "unused"])
    steps = min(recipe.steps, config.steps or recipe.steps)
    every = max(1, steps // config.looks)
    probe = Probe(every=every, limit=config.limit, erased=config.erased, kept=config.kept)
    with tempfile.TemporaryDirectory() as folder:
        train(
            replace(
                recipe,
                output_dir=f"{folder}/out",
                steps=steps,
                probe=probe,
                checkpoint_every=0,
                validation=SHEET,
            )
        )
        result = json.loads(Path(folder, "out", "train_result.json").read_text())
    probes = result["probes"]
    whole = {
        "steps": result["steps"],
        "unet_forwards": sum(result["unet_forwards"].values()),
        "seconds": result["seconds"],
    }
    good = next(({"steps": int(n)} | look for n, look in probes.items() if look["good"]), None)
    cost = whole if good is None else good
    samples = recipe.batch_size + (recipe.preserve.batch_size if recipe.preserve.weight else 0)
    return {
        "probes": probes,
        "reached": good is not None,
        "steps": cost["steps"],
        "forwards": cost["unet_forwards"],
        "seconds": cost["seconds"],
        "whole_forwards": whole["unet_forwards"],
        "per_sample": whole["unet_forwards"] / (whole["steps"] * samples),
    }


def plot(found: dict[str, dict[str, Any]], file: Path) -> None:
    """Target seen, and the worst of what is kept, against passes of the UNet."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
    for name, x in found.items():
        passes = [p["unet_forwards"] for p in x["probes"].values()]
        seen = [100 * p["target_seen"] for p in x["probes"].values()]
        kept = [100 * min(v for k, v in p.items() if "kept" in k) for p in x["probes"].values()]
        left.plot(passes, seen, "o-", label=name)
        right.plot(passes, kept, "o-", label=name)
    left.set(xlabel="UNet passes", ylabel="target seen, %", ylim=(-3, 103))
    right.set(xlabel="UNet passes", ylabel="least kept of any column, %", ylim=(-3, 103))
    left.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
