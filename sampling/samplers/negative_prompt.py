"""The concept as a negative prompt: what everybody has already, as a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expunge.concepts import Concept
from expunge.errors import UserError
from expunge.sampling.samplers.base import Sampler, joined

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.sampling.denoiser_hook import Denoising, Guidance


@dataclass(frozen=True)
class NegativePrompt(Sampler):
    """Guidance starts from the concept's text instead of from the empty one.

    ε = eh + s (ep − eh), at no cost; or, with a weight of its own and a third branch,
    ε = e0 + s ((ep − e0) − w (eh − e0)).

    Attributes:
        weight: w; not given, the concept takes the place of the negative prompt.
    """

    weight: float | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 <= self.weight <= 100:
            raise ValueError(f"got weight {self.weight}; allowed: 0 to 100; (s − 1)/s is as usual")

    def wrap(self, pipeline: Any, concept: Concept | None) -> Any:
        """The pipeline with all targets of the concept at once as its negative prompt."""
        from expunge.sampling.denoiser_hook import Guidance, encode, guide_denoiser
        from expunge.sampling.text_guidance import away

        text = joined(self.require(concept))

        def start(pipeline: Any, arguments: Mapping[str, Any]) -> Guidance:
            harm = encode(pipeline, text, arguments.get("clip_skip"))
            if (w := self.weight) is not None:

                def guided(call: Denoising) -> Tensor:
                    return away(call.e0, call.ep, call.branch(harm), call.s, w)

                return Guidance(guided=guided)
            _refuse_another(arguments)
            return Guidance(
                embeddings=lambda step, states: _first_half(states, harm.states),
                pooled=lambda pooled: _first_half(pooled, harm.pooled),
            )

        return guide_denoiser(pipeline, start)


def _first_half(pair: Tensor, replacement: Any) -> Tensor:
    """(2B, …) with its unconditional half replaced by B times (1, …)."""
    if pair.shape[1:] != replacement.shape[1:]:
        raise UserError(
            f"got prompt embeddings of shape {tuple(pair.shape[1:])}, and a concept of "
            f"{tuple(replacement.shape[1:])}; allowed: the same; give a prompt instead, or set "
            "weight"
        )
    changed = pair.clone()
    changed[: len(pair) // 2] = replacement.to(pair)
    return changed


def _refuse_another(arguments: Mapping[str, Any]) -> None:
    for name in ("negative_prompt", "negative_prompt_2", "negative_prompt_embeds"):
        given = arguments.get(name)
        # An empty text is no negative prompt; pipelines take a list of them as well.
        texts = [given] if given is None or isinstance(given, str) else list(given)
        if any(not isinstance(text, str | None) or text for text in texts):
            raise UserError(
                f"got {name}, whose place the concept takes; allowed: none; leave it out, or set "
                "weight, which keeps it"
            )
