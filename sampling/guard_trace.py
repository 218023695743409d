"""What a guard did in one call of a pipeline, step by step: record, JSON and picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """What the guard saw and did in one denoising step, for the B samples of a call.

    Attributes:
        t: The timestep.
        score: p_h, NaN where it was not asked.
        fired: Whether the sample was corrected.
        seconds: What that took.
    """

    t: float
    score: list[float]
    fired: list[bool]
    seconds: float


@dataclass
class Trace:
    """One call of a guarded pipeline.

    Attributes:
        steps: In order.
        final: p_h of the finished pictures; empty when it was not asked.
        withheld: Which pictures were withheld.
    """

    steps: list[Step] = field(default_factory=list)
    final: list[float] = field(default_factory=list)
    withheld: list[bool] = field(default_factory=list)

    def of(self, i: int) -> dict[str, Any]:
        """What concerns picture i, as JSON values; a score that was not asked is null."""
        scores = [step.score[i] for step in self.steps]
        found = {
            "t": [step.t for step in self.steps],
            "score": [None if math.isnan(score) else round(score, 4) for score in scores],
            "fired": [step.fired[i] for step in self.steps],
            # Of the whole call: its samples are looked at together.
            "guard_seconds": [round(step.seconds, 4) for step in self.steps],
        }
        if self.withheld:
            found |= {"final_score": round(self.final[i], 4), "withheld": self.withheld[i]}
        return found


def draw(pictures: Sequence[dict[str, Any]], thresholds: Sequence[float], file: Path) -> None:
    """Draw every picture's p_h over the steps; dots where it was corrected, dashed lines at η.

    Args:
        pictures: Of each its `prompt`, `seed` and what `Trace.of` says.
        thresholds: η of each concept.
        file: A PNG.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    prompts = list(dict.fromkeys(str(picture["prompt"]) for picture in pictures))
    for picture in pictures:
        place = prompts.index(str(picture["prompt"]))
        colour = f"C{place % 10}"
        asked = [i for i, score in enumerate(picture["score"]) if score is not None]
        scores = [picture["score"][i] for i in asked]
        (line,) = axes.plot(asked, scores, color=colour, lw=1, alpha=0.8)
        fired = [i for i in asked if picture["fired"][i]]
        axes.plot(fired, [picture["score"][i] for i in fired], "o", color=colour, markersize=4)
        if picture["prompt"] not in [text.get_label() for text in axes.lines]:
            line.set_label(picture["prompt"])
    for η in sorted(set(thresholds)):
        axes.axhline(η, color="#cf222e", ls="--", lw=1)
    axes.set(xlabel="denoising step", ylabel="p_h(x̂0); dashed: η; dots: corrected")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
