"""CLIP score: how well a picture goes with its prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from expunge.backbones import device_of
from expunge.clip import load_clip
from expunge.eval.features.clip import CLIP_HELP, clip_protocol
from expunge.eval.metrics import Batch
from expunge.eval.metrics.pictures import MeanTally, PictureSettings, good, says

Name = Literal["cosine", "logits", "torchmetrics", "clipscore", "sdd"]


@dataclass(frozen=True)
class Formula:
    """w c, or with a floor w max(c, 0), of a picture's cosine c with prefix + prompt."""

    w: float
    floor: bool
    prefix: str = ""

    def of(self, cosine: torch.Tensor) -> torch.Tensor:
        """The scores of cosines."""
        return self.w * (cosine.clamp(min=0) if self.floor else cosine)


FORMULAS: dict[Name, Formula] = {
    "cosine": Formula(1.0, False),
    "logits": Formula(100.0, False),
    "torchmetrics": Formula(100.0, True),
    "clipscore": Formula(2.5, True, "A photo depicts "),
    "sdd": Formula(1.0, True, "A photo depicts "),
}


@dataclass(frozen=True, kw_only=True)
class ClipScore(PictureSettings):
    """Mean over pictures of a function of c = cos(CLIP(picture), CLIP(prefix + prompt)).

    ============  ============  ====================  ==========================================
    formula       score         prefix                used by
    ============  ============  ====================  ==========================================
    cosine        c             none                  AdvUnlearn (ViT-B/32)
    logits        100 c         none                  MACE (ViT-B/32): CLIP's own logits
    torchmetrics  100 max(c,0)  none                  torchmetrics, per picture
    clipscore     2.5 max(c,0)  "A photo depicts "    CLIPScore, arXiv 2104.08718 (ViT-B/32)
    sdd           max(c,0)      "A photo depicts "    SDD, arXiv 2307.05977 (ViT-L/14)
    ============  ============  ====================  ==========================================

    Compare figures of the same CLIP, formula and prefix only: one model may read 0.31, 31 or 0.27.
    Beyond a CLIP's context (77 tokens) a prompt is cut. n: a hundred prompts or more. Interval:
    cluster bootstrap by prompt. A CLIP that guided or trained must not judge.
    """

    clip: str = field(default="ViT-L-14/openai", metadata={"help": CLIP_HELP})
    formula: Name = field(default="cosine", metadata={"help": "what is made of the cosine"})
    prefix: str | None = field(
        default=None, metadata={"help": "put before every prompt; null: the formula's own"}
    )
    device: str = field(default="auto", metadata={"help": "where it runs"})
    higher_is_better: bool = good(True)
    meaning: str = says("how well pictures go with their prompts")

    def open(self) -> ClipScoreTally:
        """Load the CLIP."""
        return ClipScoreTally(self)


class ClipScoreTally(MeanTally):
    """Scores of one model's pictures."""

    def __init__(self, settings: ClipScore) -> None:
        super().__init__(settings)
        self._name = settings.formula
        self._clip = load_clip(settings.clip, device_of(settings.device))
        self._formula = FORMULAS[settings.formula]
        own = self._formula.prefix
        self._prefix = own if settings.prefix is None else settings.prefix

    def protocol(self) -> dict[str, Any]:
        """CLIP, formula and prefix."""
        return {
            "metric": "clip_score",
            "formula": self._name,
            "prefix": self._prefix,
            **clip_protocol(self._clip),
        }

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """See pictures and their prompts."""
        texts = [self._prefix + case.prompt for case in batch.cases]
        pictures = self._clip.encode_images(batch.images.to(self._clip.device))
        cosine = (pictures * self._clip.encode_texts(texts)).sum(1)
        self._seen.add(batch.cases, self._formula.of(cosine).cpu().numpy())
