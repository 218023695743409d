"""The safe sampler: corrects x̂0 where a harm density fires, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from expunge.concepts import Concept
from expunge.decoding import DECODERS
from expunge.densities import DENSITIES
from expunge.sampling.correction import Correction
from expunge.sampling.samplers.base import Sampler


@dataclass(frozen=True)
class Safe(Sampler):
    """x̂0 is corrected while p_h(x̂0) ≥ η for any concept; else the trajectory is left alone.

    Attributes:
        density: p_h and η.
        correction: How x̂0 is corrected.
        decoder: From x̂0 to the picture whose gradient is taken.
        gate: From x̂0 to the picture that is compared with η; a cheap one will do.
        strict: Withhold finished pictures that still reach η.
        resample: With `strict`, how often to draw again first.
    """

    density: Annotated[Any, DENSITIES] = field(
        default_factory=lambda: DENSITIES.load("clip_text")()
    )
    correction: Correction = field(default_factory=Correction)
    decoder: Annotated[Any, DECODERS] = field(default_factory=lambda: DECODERS.load("vae")())
    gate: Annotated[Any, DECODERS] = field(default_factory=lambda: DECODERS.load("auto")())
    strict: bool = False
    resample: int = 0

    def __post_init__(self) -> None:
        if self.resample < 0 or (self.resample and not self.strict):
            raise ValueError(
                f"got resample {self.resample}; allowed: 0 or more, above 0 with strict true"
            )

    def wrap(self, pipeline: Any, concept: Concept | None) -> Any:
        """The pipeline, guarded; see `expunge.sampling.guard`."""
        from expunge.sampling.guard import guard

        concept = self.require(concept)
        density = density_of(self.density, concept, pipeline)
        return guard(
            pipeline,
            density,
            # Whatever picture fires, the concept is what it was looked for.
            texts=density.texts or [", ".join(concept.targets)] * len(density.names),
            decode=self.decoder.build(pipeline),
            look=self.gate.build(pipeline),
            how=self.correction,
            strict=self.strict,
            resample=self.resample,
        )

    def identity(self, pipeline: Any, concept: Concept | None) -> dict[str, Any]:
        """The weights of density and decoders."""
        density = density_of(self.density, self.require(concept), pipeline)
        return {
            "density": density.identity(),
            "decoder": self.decoder.build(pipeline).sha256(),
            "gate": self.gate.build(pipeline).sha256(),
        }


def density_of(config: Any, concept: Concept, pipeline: Any) -> Any:
    """The density for a pipeline's pictures.

    Raises:
        UserError: It cannot see them, see `expunge.sampling.guard.require_sight`.
    """
    from expunge.sampling.guard import require_sight

    density = config.build(concept, pipeline.device)
    require_sight(density, pipeline)
    return density


def published_correction() -> Correction:
    """x̂0 − γ ∇log p_h with γ = 75 at every step that fires (arXiv 2505.08817)."""
    return Correction(
        direction="gradient", scale="published", strength=75.0, start=0.0, release=1.0
    )


@dataclass(frozen=True)
class Published(Safe):
    """The thesis's sampler with its constants: η = 0.23, K = 1, γ = 75, the VAE at every step.

    They were chosen for OpenAI's ViT-B/16 and SD 1.4 at 512 pixels, and mean nothing elsewhere.
    """

    density: Annotated[Any, DENSITIES] = field(
        default_factory=lambda: DENSITIES.load("clip_text")(top_k=1, threshold=0.23)
    )
    correction: Correction = field(default_factory=published_correction)
    gate: Annotated[Any, DECODERS] = field(default_factory=lambda: DECODERS.load("vae")())
