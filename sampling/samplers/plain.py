"""No guard: what the weights themselves do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from expunge.concepts import Concept
from expunge.sampling.samplers.base import Sampler


@dataclass(frozen=True)
class Plain(Sampler):
    """The pipeline as it is."""

    needs_concept: ClassVar[bool] = False

    def wrap(self, pipeline: Any, concept: Concept | None) -> Any:
        """The pipeline, unchanged."""
        return pipeline
