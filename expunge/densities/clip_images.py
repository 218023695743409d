"""A concept in pictures: likeness to a folder of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expunge.densities.clip_text import check_clips
from expunge.densities.cosine import Cosine
from expunge.densities.thresholds import check_threshold, one_or_more, spread_threshold
from expunge.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.clip import Clip
    from expunge.concepts import Concept
    from expunge.densities.base import HarmDensity

# η when none is given: what nine of ten examples reach, each compared with the others.
REACHED_BY = 0.9


@dataclass(frozen=True)
class ClipImages:
    """p_h(x) = cos(CLIP(x), mean of CLIP(e)), or the mean of the k largest cos(CLIP(x), CLIP(e)).

    The pictures e of a folder are the concept; a picture says more than a word.

    Attributes:
        folder: The example pictures; those of the concept (`concept.images`) when empty.
        clip: As for `clip_text`; several are averaged.
        prototype: `mean`, the examples' mean direction, or `nearest`, the k most alike of them.
        nearest: k.
        threshold: η, in cosine. Null takes what nine of ten examples reach when each is compared
            with the others; pictures are far more alike than a picture and a text.
        name: What the concept is called; the folder's name when empty.
    """

    folder: str = ""
    clip: str | list[str] = "emoji"
    prototype: Literal["mean", "nearest"] = "mean"
    nearest: int = 1
    threshold: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_threshold(self.threshold, -1, 1)
        check_clips(self.clip)
        if self.nearest < 1:
            raise ValueError(f"got nearest {self.nearest}; allowed: 1 or more")

    def build(self, concept: Concept | None = None, device: Any = "cpu") -> HarmDensity:
        """The density of the folder's pictures.

        Raises:
            UserError: No folder is named; it is missing or holds no picture or a broken one; fewer
                pictures than `nearest`, or than a threshold takes; no such CLIP.
        """
        from expunge.pictures import picture_files, read_picture

        folder = self.folder or (concept.images if concept is not None else "")
        if not folder:
            raise UserError(
                "got density clip_images without pictures; allowed: a folder of examples; say "
                "density.folder, or in a training concept.images"
            )
        files = picture_files(folder)
        pictures = [read_picture(file) for file in files]
        # A threshold is taken from each picture's likeness to all others.
        needed = self.nearest if self.prototype == "nearest" else 1
        if self.threshold is None:
            needed = max(needed + 1, 3)
        if len(files) < needed:
            raise UserError(
                f"got {len(files)} pictures in {folder}; allowed: {needed} or more for these "
                "settings; add pictures, or set threshold and nearest"
            )
        from expunge.clip import load_clip
        from expunge.results import sha256_file

        k = self.nearest if self.prototype == "nearest" else None
        guides = []
        for clip_name in one_or_more(self.clip):
            clip = load_clip(clip_name, device)
            guides.append((clip, _encode(clip, pictures)))
        examples = [vectors for _, vectors in guides]
        η = likeness_within(examples, k) if self.threshold is None else self.threshold
        names = [self.name or (concept.name if concept is not None else Path(folder).name)]
        identity = {"examples": sorted(sha256_file(file) for file in files), "nearest": k}
        thresholds = spread_threshold(η, names, device)
        if k is not None:
            return Nearest(guides, names, thresholds, k, identity)
        means = [(clip, vectors.mean(0, True)) for clip, vectors in guides]
        means = [(clip, mean / mean.norm()) for clip, mean in means]
        return Cosine(means, names, thresholds, identity=identity)


class Nearest(Cosine):
    """The mean of the k largest cosines with N examples, as one concept."""

    def __init__(
        self,
        guides: Sequence[tuple[Clip, Tensor]],
        names: Sequence[str],
        thresholds: Tensor,
        nearest: int,
        identity: dict[str, Any],
    ) -> None:
        super().__init__(guides, names, thresholds, identity=identity)
        self.nearest = nearest

    def per_concept(self, images: Tensor) -> Tensor:
        """(B, 1)."""
        return self.cosines(images).topk(self.nearest, dim=1).values.mean(dim=1, keepdim=True)


def likeness_within(examples: Sequence[Tensor], nearest: int | None) -> float:
    """The score that nine of ten examples reach, each left out of the examples in turn.

    Args:
        examples: Unit vectors (N, D) of the same N ≥ 2 pictures, in each CLIP.
        nearest: k of the nearest examples, or None for their mean direction.
    """
    import torch

    scores = []
    for vectors in examples:
        if nearest is None:
            others = torch.nn.functional.normalize(vectors.sum(0) - vectors, dim=1)
            scores.append((vectors * others).sum(1))
        else:
            scores.append(vectors @ vectors.T)
    score = torch.stack(scores).mean(0)
    if nearest is not None:
        alike = score.masked_fill(torch.eye(len(score), dtype=torch.bool, device=score.device), -2)
        score = alike.topk(nearest, dim=1).values.mean(1)
    return float(score.quantile(1 - REACHED_BY))


def _encode(clip: Clip, pictures: Sequence[Tensor]) -> Tensor:
    import torch

    with torch.no_grad():
        # One at a time: a folder's pictures have any size.
        return torch.cat([clip.encode_images(p[None].to(clip.device)) for p in pictures])
