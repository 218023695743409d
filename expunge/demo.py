"""`expunge demo`: the whole loop on the bundled model, ending with a picture and a table."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from expunge.configuration import parse

CONFIG = "train/emoji_bomb_density.yaml"
RESULTS = {
    "pytorch_lora_weights.safetensors": "lora",
    "report.json": "report",
    "report.md": "report",
    "report.html": "report",
    "grid.png": "report",
}


@dataclass(frozen=True)
class DemoConfig:
    """What `expunge demo` is told."""

    output_dir: Path = field(metadata={"help": "folder for everything; a rerun goes on"})
    limit: int = field(default=24, metadata={"help": "pictures of each group in the evaluation"})

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"got limit {self.limit}; allowed: 1 or more")


def main(argv: list[str]) -> int:
    """Erase "bomb" from the emoji model, evaluate before and after, leave a picture and a table."""
    config = parse(DemoConfig, argv, "expunge demo")
    from expunge.eval.command import main as evaluate
    from expunge.results import fresh_output_dir
    from expunge.train.train_erase import main as train

    folder, started = config.output_dir, time.monotonic()
    fresh_output_dir(folder, resume=True)
    print("1. Erase: distil the harm density into a LoRA of the emoji model's UNet", flush=True)
    train(["--config", CONFIG, "--output_dir", str(folder / "lora"), "--resume", "true"])
    print(
        "2. Measure: the same prompts and seeds before and after, judged independently", flush=True
    )
    # A process computes on one thread, so that a picture has the same bits everywhere.
    status = evaluate(
        [
            *("--suite", "emoji", "--model", "emoji", "--lora", str(folder / "lora")),
            *("--limit", str(config.limit), "--output_dir", str(folder / "report")),
            *("--processes", str(min(2, os.cpu_count() or 1))),
        ]
    )
    if status:
        return status
    for name, where in RESULTS.items():
        temporary = folder / f".{name}.tmp"
        shutil.copyfile(folder / where / name, temporary)
        temporary.replace(folder / name)
    minutes = (time.monotonic() - started) / 60
    print(f"{minutes:.1f} minutes. Before and after: {folder / 'grid.png'}")
    print(f"Every picture and number: {folder / 'report.html'}")
    print(f"The LoRA: {folder / 'pytorch_lora_weights.safetensors'}")
    return 0
