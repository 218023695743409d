"""UCE, unified concept editing (arXiv 2308.14761): keys and values in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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
        neutral_scale: b of the neutral prompt, in the same way. Guidance reads it in every step, so
            that a change of it is in every picture. Published: 0.
        regularisation: λ.
        pairs: Erase it beside every retained noun as well, there onto nothing, whatever the anchor
            ("X and a bomb" is read as "X and "), so that what stands beside it is not taken along;
            published: no.
        sentences: In which retained nouns are held as well, ``{}`` is their place; all sentences of
            a noun together weigh as much as the noun alone. Published: none.
        tokens: Of each text `last`, its last token, as published; `rest`, of what is erased that
            and all behind it, of what stays all, the padding as one token.
    """

    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    neutral_scale: float = 0.0
    regularisation: float = 0.5
    pairs: bool = False
    sentences: list[str] = field(default_factory=list)
    tokens: Literal["last", "rest"] = "last"

    modules: ClassVar[str] = "x-strict"
    ema_decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        above = self.erase_scale, self.regularisation
        least = self.preserve_scale, self.neutral_scale
        if not (min(above) > 0 and min(least) >= 0 and max(*above, *least) < math.inf):
            raise ValueError(
                f"got {self}; allowed: erase_scale and regularisation above 0, preserve_scale and "
                "neutral_scale 0 or more, all finite"
            )
        if not all(sentence.count("{}") == 1 for sentence in self.sentences):
            raise ValueError(f"got sentences {self.sentences}; allowed: texts, each with one {{}}")

    def fit(self, pipeline: Any, concept: Concept) -> Edit:
        """The edit of all keys and values."""
        return self.gather(pipeline, concept).solve()

    def gather(self, pipeline: Any, concept: Concept) -> Fitter:
        """A fitter that knows what is erased and what stays."""
        from expunge.train.closed_form.fitter import Fitter, embeddings
        from expunge.train.preserve import Preserve

        fitter = Fitter(pipeline.unet.config.cross_attention_dim, self.regularisation)

        def preserve(prompt: str, b: float) -> None:
            end = len(prompt) if self.tokens == "last" else 0
            p, counts = embeddings(pipeline, prompt, end, self.tokens)
            fitter.preserve(p, b * len(concept.targets) * counts)

        nouns = Preserve.nouns(concept)
        beside = [text for noun in nouns for text in (f"{{}} and {noun}", f"{noun} and {{}}")]
        for target in concept.targets:
            away = [(template, concept.anchor_of(target)) for template in concept.templates]
            if self.pairs:
                away += [(template, "") for template in beside]
            for template, anchor in dict.fromkeys(away):
                # Both begin where the noun stands, so that all that follows meets itself.
                (c, counts), (g, _) = (
                    embeddings(
                        pipeline,
                        template.replace("{}", text),
                        template.index("{}") + len(text),
                        self.tokens,
                    )
                    for text in (target, anchor)
                )
                n = min(len(c), len(g))
                fitter.erase(c[:n], g[:n], self.erase_scale * counts[:n])
        preserve(concept.neutral, self.neutral_scale)
        for prompt in concept.retained():
            preserve(prompt, self.preserve_scale)
        for sentence in self.sentences:
            for noun in nouns:
                preserve(sentence.replace("{}", noun), self.preserve_scale / len(self.sentences))
        return fitter
