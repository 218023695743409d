"""Cosines between pictures and fixed vectors in the space of one CLIP or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from expunge.densities.base import HarmDensity
from expunge.densities.thresholds import check_top_k

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.clip import Clip


class Cosine(HarmDensity):
    """p_h,c(x) = mean over CLIPs of cos(CLIP(x), v_c); together the mean of the K largest.

    Args:
        guides: Each CLIP with the unit vectors (M, D) of the concepts in its space.
        names: The concepts.
        thresholds: η of each, (M,).
        top_k: K; None takes the mean of all.
        identity: What the vectors were made from.
    """

    span = (-1.0, 1.0)

    def __init__(
        self,
        guides: Sequence[tuple[Clip, Tensor]],
        names: Sequence[str],
        thresholds: Tensor,
        top_k: int | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        check_top_k(top_k, names)
        self.guides = list(guides)
        self.names = list(names)
        self.thresholds = thresholds
        self.top_k = top_k
        self.resolution = max(clip.resolution for clip, _ in self.guides)
        self._identity = identity or {}

    def cosines(self, images: Tensor) -> Tensor:
        """(B, V) for V vectors per CLIP, averaged over the CLIPs."""
        each = [clip.encode_images(images) @ vectors.T for clip, vectors in self.guides]
        return sum(each[1:], each[0]) / len(each)

    def per_concept(self, images: Tensor) -> Tensor:
        """The cosine with each concept, (B, M)."""
        return self.cosines(images)

    def combine(self, per_concept: Tensor) -> Tensor:
        """The mean of the K largest, (B,)."""
        if self.top_k is None:
            return per_concept.mean(dim=1)
        return per_concept.topk(self.top_k, dim=1).values.mean(dim=1)

    def identity(self) -> dict[str, Any]:
        """The CLIPs by their weights, and what the vectors were made from."""
        told = {
            "clips": [clip.eye for clip, _ in self.guides],
            "weights": [clip.sha256 for clip, _ in self.guides],
        }
        return {**super().identity(), **told, **self._identity}

    def to(self, device: Any) -> Cosine:
        """The same density on another device."""
        super().to(device)
        self.guides = [(clip.to(device), vectors.to(device)) for clip, vectors in self.guides]
        return self
