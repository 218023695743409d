"""Another density on the scale of harmless pictures, so that one threshold fits all concepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from expunge.densities import DENSITIES
from expunge.densities.base import DensityConfig, HarmDensity, check_finite
from expunge.densities.reference import Reference, read_reference
from expunge.densities.thresholds import check_threshold, spread_threshold
from expunge.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.concepts import Concept

# More order statistics than this change no percentile that one could tell apart.
MOST = 2048
# A threshold η takes NEEDED / (1 − η) pictures, twice the least that could reach it at all: 0.99 is
# then reached from 3.1 standard deviations on, with ten times as many from 2.5; exactly, from 2.3.
NEEDED = 2
# Of the kernel: its tail falls as z⁻⁴, its standard deviation is √(16/3).
TAIL = 4.0
SPREAD = (16 / 3) ** 0.5


@dataclass(frozen=True)
class Calibrated:
    """p_c(x) = P(s'_c(x') ≤ s'_c(x)) over harmless x', with s'_c(x) = s_c(x) − α E_x'[s_c(x')].

    Of n pictures it is n / (n + 1) times the smooth percentile (`percentile`), whose gradient never
    vanishes: that nothing reaches 1 is what n pictures can tell (conformal prediction). Ours; the
    correction follows the language prior of Lin et al. (arXiv 2306.01879).

    Attributes:
        density: The density whose scores s are put on that scale; its own threshold is not used.
        file: What `expunge calibrate` wrote for it.
        alpha: α. Only `pooled` depends on it: a concept's own percentile does not change when its
            scores are shifted.
        scale: `concept`: each concept has its own percentiles. `pooled`: all share those of the
            corrected scores together, for references too small to give each its own.
        threshold: η, a share of harmless pictures: at 0.99 one in a hundred of them fires. It takes
            a reference of 2 / (1 − η) pictures or more: with fewer hardly anything fires.
    """

    density: Annotated[DensityConfig, DENSITIES]
    file: str
    alpha: float = 1.0
    scale: Literal["concept", "pooled"] = "concept"
    threshold: float | list[float] = 0.99

    def __post_init__(self) -> None:
        check_threshold(self.threshold, 0, 1)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"got alpha {self.alpha}; allowed: 0 (no correction) to 1 (all of it)")
        if isinstance(self.density, Calibrated):
            raise ValueError("got a calibrated density inside a calibrated one; allowed: any other")

    def build(self, concept: Concept | None = None, device: Any = "cpu") -> HarmDensity:
        """The density, once it is sure that the file was made with the same one.

        Raises:
            UserError: The file is missing, broken, or of another density, concept or CLIP, or of
                too few pictures for the threshold.
        """
        reference = read_reference(self.file)
        inner = self.density.build(concept, device)
        own = inner.identity()
        differs = [key for key in own if own[key] != reference.identity.get(key)]
        if differs:
            raise UserError(
                f"got calibration {self.file}, made with another density: {differs[0]} differs; "
                "allowed: the same texts, files and CLIP; run expunge calibrate again"
            )
        η = spread_threshold(self.threshold, inner.names, device)
        return Percentile(inner, reference, η, self.alpha, self.scale == "pooled")


class Percentile(HarmDensity):
    """The percentile of another density's scores among harmless pictures.

    Args:
        inner: That density.
        reference: Its scores of harmless pictures.
        thresholds: η of each concept, (M,).
        alpha: Share of the mean harmless score that is taken off, before pooling.
        pooled: Whether all concepts share one scale.
    """

    def __init__(
        self,
        inner: HarmDensity,
        reference: Reference,
        thresholds: Tensor,
        alpha: float = 1.0,
        pooled: bool = False,
    ) -> None:
        import torch

        self.inner, self.thresholds = inner, thresholds
        self.names, self.resolution = list(inner.names), inner.resolution
        self.texts = inner.texts
        scores = torch.tensor(reference.scores, dtype=torch.float64)
        prior = alpha * scores.mean(1) if pooled else torch.zeros(len(scores))
        corrected = scores - prior[:, None].double()
        if pooled:
            corrected = corrected.reshape(1, -1)
        corrected = corrected.sort(dim=1).values
        n = corrected.shape[1]
        self._most = n / (n + 1)
        most = 1 - NEEDED / n
        # In float32 a threshold is not quite what was written.
        if (thresholds > most + 1e-6).any():
            raise UserError(
                f"got threshold {thresholds.max().item():g} for a calibration of {n} pictures, "
                f"which hardly anything would reach; allowed: up to {most:.4g}; calibrate with more"
            )
        corrected = _thinned(corrected)
        width = bandwidth(corrected, n)
        # On the CPU first: not every device has float64.
        self._prior, self._reference, self._width = (
            x.float().to(thresholds.device) for x in (prior, corrected, width)
        )

    def per_concept(self, images: Tensor) -> Tensor:
        """The percentile, (B, M), in (0, 1)."""
        scores = self.inner.per_concept(images) - self._prior
        # On this scale minus infinity would be 0, and safe.
        check_finite(scores)
        return self._most * percentile(scores, self._reference, self._width)

    def combine(self, per_concept: Tensor) -> Tensor:
        """As the density itself combines its concepts."""
        return self.inner.combine(per_concept)

    def identity(self) -> dict[str, Any]:
        """The density and its reference."""
        import hashlib

        digest = hashlib.sha256(self._reference.cpu().numpy().tobytes()).hexdigest()
        return {**super().identity(), "density": self.inner.identity(), "reference": digest}

    def to(self, device: Any) -> Percentile:
        """The same density on another device."""
        super().to(device)
        self.inner.to(device)
        self._prior, self._reference, self._width = (
            x.to(device) for x in (self._prior, self._reference, self._width)
        )
        return self


def percentile(scores: Tensor, reference: Tensor, width: Tensor) -> Tensor:
    """F_c(s) = (1/n) Σ_i K((s − r_ci) / h_c), K(z) = ½ + ½ sign(z) (1 − (1 + |z|/4)⁻⁴).

    A distribution function with a heavy-tailed kernel: increasing, between 0 and 1, and its slope
    falls so slowly (as z⁻⁵) that far above all harmless pictures there is still a gradient; a
    Gaussian or logistic kernel has none there in float32.

    Args:
        scores: s, (B, M).
        reference: r, (M, n) or (1, n), harmless scores.
        width: h, (M,) or (1,).
    """
    z = (scores[:, :, None] - reference) / width[:, None]
    # What a kernel lacks to 1, or has above 0: whichever is small, so that its slope is exact.
    tail = (1 + z.abs() / TAIL) ** -TAIL / 2
    above = z > 0
    low, high = tail.masked_fill(above, 0).sum(2), tail.masked_fill(~above, 0).sum(2)
    share: Tensor = (above.sum(2) - high + low) / z.shape[2]
    return share


def bandwidth(reference: Tensor, n: int) -> Tensor:
    """Silverman's rule for this kernel, h = 0.9 σ̂ n^(−1/5) / √(16/3), of sorted scores (M, n').

    σ̂ is the smaller of the standard deviation and the interquartile range / 1.34, so that a few
    outliers do not blur all the others.
    """
    deviation = reference.std(1)
    quarter = reference.quantile(reference.new_tensor([0.25, 0.75]), dim=1)
    robust = (quarter[1] - quarter[0]) / 1.34
    spread = deviation.minimum(robust.where(robust > 0, deviation))
    # Scores that are all the same still need a width.
    width: Tensor = 0.9 * spread * n**-0.2 / SPREAD
    return width.clamp(min=1e-5)


def _thinned(ordered: Tensor) -> Tensor:
    """At most `MOST` order statistics, evenly spread, of each row."""
    import torch

    n = ordered.shape[1]
    if n <= MOST:
        return ordered
    middle = (torch.arange(MOST, dtype=torch.float64) + 0.5) / MOST
    return ordered[:, (middle * n).long()]
