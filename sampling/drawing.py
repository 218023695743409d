"""What every command that draws pictures is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """With which model, how often and how pictures are drawn."""

    model: str = field(default="emoji", metadata={"help": "emoji, a diffusers folder, a hub id"})
    seed: int = field(default=0, metadata={"help": "seed of a prompt's first picture"})
    images_per_prompt: int = field(default=4, metadata={"help": "seeds seed, seed + 1, …"})
    steps: int = field(default=25, metadata={"help": "denoising steps"})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "default: what suits the model (emoji 4, others 7.5)"}
    )
    batch_size: int = 16
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("images_per_prompt", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}; allowed: 1 or more")
