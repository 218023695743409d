"""SLD, safe latent diffusion (arXiv 2211.05105)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from expunge.concepts import Concept
from expunge.sampling.samplers.base import Sampler, joined

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.sampling.denoiser_hook import Denoising, Guidance
    from expunge.sampling.text_guidance import SldStrength


@dataclass(frozen=True)
class Sld(Sampler):
    """Every step is led away from the concept's text where the prompt comes near it.

    ε = e0 + s ((ep − e0) − g), g = μ (eh − e0) + s_m ν; see `expunge.sampling.text_guidance.sld`.

    Attributes:
        preset: The paper's `weak`, `medium`, `strong` or `max`.
        warmup: δ, plain steps at the start; like all others, as in the preset when not given.
        scale: s_S.
        threshold: λ.
        momentum_scale: s_m.
        momentum: β.
    """

    preset: Literal["weak", "medium", "strong", "max"] = "medium"
    warmup: int | None = None
    scale: float | None = None
    threshold: float | None = None
    momentum_scale: float | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        allowed = {
            "warmup": (0, float("inf")),
            "scale": (0, float("inf")),
            "threshold": (float("-inf"), float("inf")),
            "momentum_scale": (0, 1),
            "momentum": (0, 1),
        }
        for name, (low, high) in allowed.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"got {name} {value}; allowed: {low} to {high}")

    @property
    def strength(self) -> SldStrength:
        """The preset, with what was given in its place."""
        from expunge.sampling.text_guidance import SLD_PRESETS, SldStrength

        given = {k: v for k, v in asdict(self).items() if k != "preset" and v is not None}
        return SldStrength(**(asdict(SLD_PRESETS[self.preset]) | given))

    def identity(self, pipeline: Any, concept: Concept | None) -> dict[str, Any]:
        """What the preset stands for."""
        return {"strength": asdict(self.strength)}

    def wrap(self, pipeline: Any, concept: Concept | None) -> Any:
        """The pipeline with a third branch, which reads all targets of the concept at once."""
        from expunge.sampling.denoiser_hook import Guidance, encode, guide_denoiser
        from expunge.sampling.text_guidance import sld

        text, how = joined(self.require(concept)), self.strength

        def start(pipeline: Any, arguments: Mapping[str, Any]) -> Guidance:
            harm = encode(pipeline, text, arguments.get("clip_skip"))
            ν: Tensor | None = None

            def guided(call: Denoising) -> Tensor:
                nonlocal ν
                if ν is None:
                    ν = call.e0.new_zeros(call.e0.shape)
                ε, ν = sld(call.e0, call.ep, call.branch(harm), call.s, ν, call.step, how)
                return ε

            return Guidance(guided=guided)

        return guide_denoiser(pipeline, start)
