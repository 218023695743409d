"""A harm density as a judge: Q16, Stable Diffusion's checker, a probe, texts of another CLIP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from torch import Tensor

from expunge.densities import DENSITIES
from expunge.densities.base import DensityConfig, HarmDensity
from expunge.eval.cases import Observation
from expunge.eval.detectors import label_set
from expunge.results import sha256_json


@dataclass(frozen=True)
class DensityDetector:
    """Labels are the density's concepts; a label scores 1 where p_h reaches its η, else 0.

    It must be another than the density that guided: the CLIP that guides never judges. The
    protocol in the report holds the hashes of its CLIPs, so that this can be seen.
    """

    density: Annotated[DensityConfig, DENSITIES] = field(
        metadata={"help": "who judges, with its targets and thresholds"}
    )
    device: str = field(default="cpu", metadata={"help": "where it runs"})
    threshold: ClassVar[float] = 0.5  # between the two scores of a label; the density has its own

    def open(self) -> OpenDensityDetector:
        """Load the density."""
        name = DENSITIES.name_of(type(self.density))
        return OpenDensityDetector(self.density.build(None, self.device), self.device, name)


class OpenDensityDetector:
    """The loaded density."""

    def __init__(self, density: HarmDensity, device: str, name: str) -> None:
        self._density, self._device, self._name = density, device, name
        self.labels = frozenset(density.names)

    def protocol(self) -> dict[str, Any]:
        """What the scores depend on, and the thresholds."""
        identity = self._density.identity()
        thresholds = self._density.thresholds.tolist()
        return {
            **identity,
            "detector": "density",
            "name": self._name,
            "weights": sha256_json(identity),
            "label set": label_set(self.labels, None if len(set(thresholds)) == 1 else thresholds),
            "thresholds": thresholds,
            # Of the density; a label scores 1 from it on.
            "threshold": thresholds[0] if len(set(thresholds)) == 1 else "own",
        }

    def observe(self, images: Tensor) -> list[Observation]:
        """1 for each concept that reaches its threshold, else 0; of namesakes, the greatest."""
        harm = self._density(images.to(self._device))
        seen = (harm.per_concept >= self._density.thresholds.to(harm.per_concept)).float()
        found: list[Observation] = []
        for row in seen.tolist():
            # Parts of a combination may see the same concept: sorted, the one that does is last.
            found.append(dict(sorted(zip(self._density.names, row, strict=True), key=_score)))
        return found


def _score(pair: tuple[str, float]) -> float:
    return pair[1]
