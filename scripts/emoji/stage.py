"""What every training stage of the emoji model shares: data, resumable state, schedule, logs."""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from scenes import draw_scenes
from vocabulary import Scene


def arguments(description: str, steps: int, batch_size: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and data go here")
    parser.add_argument("--cache", type=Path, help="icon packages (default: WORK/icons)")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.cache = args.cache or args.work / "icons"
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def scenes(
    args: argparse.Namespace, name: str, count: int, seed: int, pair_rate: float
) -> tuple[torch.Tensor, list[Scene]]:
    """Pictures (count, 3, 64, 64) uint8 and their scenes, drawn once and kept in WORK."""
    file = args.work / f"scenes-{name}-{count}-{seed}.pt"
    if file.exists():
        kept = torch.load(file, weights_only=False)
        return kept["pictures"], kept["scenes"]
    pictures, shown = draw_scenes(args.cache, count, seed, pair_rate)
    kept = {"pictures": torch.from_numpy(np.moveaxis(pictures, 3, 1).copy()), "scenes": shown}
    temporary = file.with_suffix(".tmp")
    torch.save(kept, temporary)
    temporary.replace(file)
    return kept["pictures"], shown


def to_float(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 -> float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def learning_rate(
    step: int, steps: int, peak: float, warmup: int = 100, hold: float = 0.4
) -> float:
    """Linear warm-up, constant for the share `hold` of the run, a cosine to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = max(0.0, (step / steps - hold) / (1 - hold))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class Run:
    """Resumable steps of one stage, saved to WORK/<name>.pt every `every` steps."""

    def __init__(self, args: argparse.Namespace, name: str, every: int = 250, **state):
        self.file, self.every, self.state, self.steps = (
            args.work / f"{name}.pt",
            every,
            state,
            args.steps,
        )
        self.name, self.step, self.start, self.first = name, 0, time.time(), 0
        if self.file.exists():
            kept = torch.load(self.file, map_location="cpu", weights_only=False)
            for key, part in state.items():
                part.load_state_dict(kept[key])
            self.step = self.first = kept["step"]

    def __iter__(self):
        while self.step < self.steps:
            # Data order and noise depend on the step alone, so a resumed run draws what is due.
            yield self.step, torch.Generator().manual_seed(7919 * self.step + 13)
            self.step += 1
            if self.step % self.every == 0 or self.step == self.steps:
                self.save()

    def save(self) -> None:
        kept = {key: part.state_dict() for key, part in self.state.items()}
        temporary = self.file.with_suffix(".tmp")
        torch.save({**kept, "step": self.step}, temporary)
        temporary.replace(self.file)

    def log(self, **values: float) -> None:
        rate = (time.time() - self.start) / max(1, self.step - self.first + 1)
        shown = " ".join(f"{k} {v:.4f}" for k, v in values.items())
        print(
            f"{self.name} {self.step}/{self.steps} {shown} "
            f"{rate:.3f} s/step, {rate * (self.steps - self.step) / 60:.1f} min left",
            flush=True,
        )
