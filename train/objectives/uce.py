"""UCE, unified concept editing (arXiv 2308.14761): keys and values in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from expunge.concepts import Concept

if TYPE_CHECKING:
    from expunge.train.closed_form.fitter import Edit, Fitter


@dataclass(frozen=True)
class Uce:
    """Every cross-attention reads the concept as its anchor, in seconds and without a UNet pass.

    W' = argmin Σ a ‖W' c − W g‖² + Σ b ‖W' p − W p‖² + λ ‖W' − W‖²: c of the concept's prompts, g
    of the same with the anchor in the concept's place, p of `concept.preserve`.

    Attributes:
        erase_scale: a.
        preserve_scale: b, for each target: several erase more, and so need more held against them.
        regularisation: λ.
        pairs: Erase it beside every retained noun as well ("X and a bomb" is read as "X and "), so
            that what stands beside it is not taken along; published: no.
        tokens: Of each text `last`, its last token, as published; `rest`, that and all behind it.
    """

    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    regularisation: float = 0.5
    pairs: bool = False
    tokens: Literal["last", "rest"] = "last"

    modules: ClassVar[str] = "x-strict"
    ema_decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not (self.erase_scale > 0 and self.preserve_scale >= 0 and self.regularisation > 0):
            raise ValueError(
                f"got {self}; allowed: erase_scale and regularisation above 0, preserve_scale 0 or "
                "more"
            )

    def fit(self, pipeline: Any, concept: Concept) -> Edit:
        """The edit of all keys and values."""
        return self.gather(pipeline, concept).solve()

    def gather(self, pipeline: Any, concept: Concept) -> Fitter:
        """A fitter that knows what is erased and what stays."""
        from expunge.train.closed_form.fitter import Fitter, embeddings
        from expunge.train.preserve import Preserve

        width = pipeline.unet.config.cross_attention_dim
        fitter = Fitter(width, self.regularisation)
        nouns = Preserve.nouns(concept) if self.pairs else []
        beside = [text for noun in nouns for text in (f"{{}} and {noun}", f"{noun} and {{}}")]
        for target in concept.targets:
            for template in dict.fromkeys([*concept.templates, *beside]):
                # Both begin where the noun stands, so that all that follows meets itself.
                c, g = (
                    embeddings(
                        pipeline,
                        template.replace("{}", text),
                        template.index("{}") + len(text),
                        self.tokens,
                    )
                    for text in (target, concept.anchor_of(target))
                )
                n = min(len(c), len(g))
                fitter.erase(c[:n], g[:n], self.erase_scale)
        for prompt in concept.retained():
            p = embeddings(pipeline, prompt, len(prompt), self.tokens)
            fitter.preserve(p, self.preserve_scale * len(concept.targets))
        return fitter
