"""What every harm density is: a differentiable score of pictures, with a threshold per concept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.concepts import Concept


def check_finite(scores: Tensor) -> None:
    """Refuse scores of which nothing can be said.

    Raises:
        FloatingPointError: One is NaN or infinite.
    """
    if not scores.isfinite().all():
        raise FloatingPointError(
            "the harm density is NaN or infinite: nothing can be said of these pictures"
        )


def clips_of(identity: Any) -> Iterator[str]:
    """The eyes of all CLIPs that an identity or a protocol names under `clips`, at any depth."""
    if isinstance(identity, list):
        for part in identity:
            yield from clips_of(part)
    elif isinstance(identity, Mapping):
        for key, value in identity.items():
            yield from value if key == "clips" else clips_of(value)


@dataclass(frozen=True)
class Harm:
    """How much pictures show what is to be gone.

    Attributes:
        score: p_h(x), (B,): what a gradient descends.
        per_concept: p_h of each concept, (B, M): what thresholds are compared with.
    """

    score: Tensor
    per_concept: Tensor

    def __post_init__(self) -> None:
        check_finite(self.score)
        check_finite(self.per_concept)

    def exceeds(self, η: Tensor | float) -> Tensor:
        """1[p_h ≥ η], (B,): true as soon as one concept reaches its threshold.

        Args:
            η: One threshold, or one for each concept, (M,).
        """
        return (self.per_concept >= η).any(dim=1)


class HarmDensity(ABC):
    """p_h(x): how much a picture shows each of M concepts.

    Attributes:
        names: The concepts, M of them.
        thresholds: η of each concept, (M,).
        resolution: Side in pixels of what it looks at; larger pictures are resized to it. None when
            it takes any size.
        span: The values that a concept's score can have, (low, high).
        texts: A prompt for each concept; None where there are only pictures, or names.
    """

    names: Sequence[str]
    thresholds: Tensor
    resolution: int | None = None
    span: tuple[float, float] = (0.0, 1.0)
    texts: Sequence[str] | None = None

    @abstractmethod
    def per_concept(self, images: Tensor) -> Tensor:
        """Scores (B, M) of pictures (B, 3, H, W) in [-1, 1], differentiable in them."""

    def combine(self, per_concept: Tensor) -> Tensor:
        """The score (B,) of M concepts together, from (B, M); the mean unless overridden."""
        return per_concept.mean(dim=1)

    def to(self, device: Any) -> HarmDensity:
        """The same density on another device."""
        self.thresholds = self.thresholds.to(device)
        return self

    def identity(self) -> dict[str, Any]:
        """What the scores depend on, as plain JSON values: two that agree score alike."""
        return {"class": type(self).__qualname__, "names": list(self.names)}

    def __call__(self, images: Tensor) -> Harm:
        """The harm of pictures (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: Pictures of another shape.
            FloatingPointError: A score is NaN or infinite; it is never taken for safe.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"got pictures of shape {tuple(images.shape)}; allowed: (B, 3, H, W)")
        import torch

        # Densities are read in float32 whatever the sampler runs in: η is compared to a hair.
        with torch.autocast(images.device.type, enabled=False):
            return self._harm(images.float())

    def _harm(self, images: Tensor) -> Harm:
        per_concept = self.per_concept(images)
        if per_concept.shape != (len(images), len(self.names)):
            raise ValueError(
                f"got scores of shape {tuple(per_concept.shape)}; allowed: "
                f"({len(images)}, {len(self.names)}), pictures by concepts"
            )
        return Harm(self.combine(per_concept), per_concept)

    def fires(self, images: Tensor) -> Tensor:
        """1[p_h ≥ η] at the density's own thresholds, (B,)."""
        return self(images).exceeds(self.thresholds)


@runtime_checkable
class DensityConfig(Protocol):
    """The settings of a density: a frozen dataclass, listed in the table.

    Its module does not import torch by itself, so that mistakes in settings answer at once.
    """

    def build(self, concept: Concept | None = None, device: Any = "cpu") -> HarmDensity:
        """The density itself.

        Args:
            concept: What it is to see, where the settings do not say it.
            device: Where pictures will be.

        Raises:
            UserError: A file, a model or a target is missing, or the settings contradict them.
        """
        ...
