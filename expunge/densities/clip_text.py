"""Concepts in words: the cosine between CLIP's picture and CLIP's text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from expunge.concepts import soft_names
from expunge.densities.cosine import Cosine
from expunge.densities.thresholds import (
    check_threshold,
    check_top_k,
    one_or_more,
    spread_threshold,
)
from expunge.errors import UserError

if TYPE_CHECKING:
    from expunge.clip import Clip
    from expunge.concepts import Concept
    from expunge.densities.base import HarmDensity

THESIS = 0.23  # η for OpenAI's ViT-B/16 and pictures of Stable Diffusion, arXiv 2505.08817


@dataclass(frozen=True)
class ClipText:
    """p_h,c(x) = cos(CLIP(x), CLIP(c)) for each text c, and the mean of the K largest together.

    The thesis's density (arXiv 2505.08817), which has K = 1, η = 0.23 and OpenAI's ViT-B/16.

    Attributes:
        clip: `emoji`, a folder, `hf-hub:owner/name`, or `ARCHITECTURE/tag` of open_clip. Of several
            the cosines are averaged, which leaves less room for adversarial gradients.
        targets: The texts; none takes the targets of the concept.
        threshold: η, in cosine: one for all texts, or one for each. None asks the CLIP for the
            cosine at which it gives even odds, if it learned with a bias; else the thesis's 0.23.
        top_k: K, from 1 to M; null takes the mean of all.
        thesis_compat: Normalise pictures with ImageNet's figures, as the thesis's code did.
    """

    clip: str | list[str] = "emoji"
    targets: list[str] = field(default_factory=list)
    threshold: float | list[float] | None = None
    top_k: int | None = None
    thesis_compat: bool = False

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_threshold(self.threshold, -1, 1)
        check_top_k(self.top_k, self.targets or None)
        check_clips(self.clip)
        if not all(text.strip() for text in self.targets):
            raise ValueError(f"got targets {self.targets}; allowed: texts that are not empty")

    def build(self, concept: Concept | None = None, device: Any = "cpu") -> HarmDensity:
        """The density of `targets`, or of the concept's.

        Raises:
            UserError: No target; K or the number of thresholds does not fit them; no such CLIP.
        """
        texts = self.targets or (list(concept.targets) if concept is not None else [])
        if not texts:
            raise UserError(
                "got no targets for clip_text; allowed: one text or more; say what is to be seen, "
                'for example targets: ["a bomb"]'
            )
        if soft := [name for text in texts for name in soft_names(text)]:
            raise UserError(
                f"got {soft[0]} as a target of clip_text; allowed: words, since no CLIP knows a "
                "soft token; name it in words, or show it in pictures "
                "(clip_images, clip_head)"
            )
        check_top_k(self.top_k, texts)
        if self.threshold is not None:
            spread_threshold(self.threshold, texts)
        # Imported late, as what is wrong above is known at once and open_clip takes seconds.
        from expunge.clip import load_clip

        clips = [load_clip(name, device, self.thesis_compat) for name in one_or_more(self.clip)]
        threshold = even_odds(clips) if self.threshold is None else self.threshold
        check_threshold(threshold, -1, 1)
        η = spread_threshold(threshold, texts, device)
        guides = [(clip, clip.encode_texts(texts)) for clip in clips]
        density = Cosine(guides, texts, η, self.top_k)
        density.texts = texts
        return density


def even_odds(clips: list[Clip]) -> float:
    """The mean of the cosines at which CLIPs give even odds, 0.23 for one that has none."""
    known = [THESIS if clip.undecided is None else clip.undecided for clip in clips]
    return sum(known) / len(known)


def check_clips(clip: str | list[str]) -> None:
    """Refuse an empty name and an empty list.

    Raises:
        ValueError: There is no CLIP in it.
    """
    names = one_or_more(clip)
    if not names or not all(name.strip() for name in names):
        raise ValueError(f"got clip {clip!r}; allowed: a name or a list of names, none empty")
