"""Negative classifier guidance: class guidance (arXiv 2105.05233) with its sign reversed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from expunge.concepts import Concept
from expunge.decoding import DECODERS
from expunge.densities import DENSITIES
from expunge.sampling.samplers.base import Sampler
from expunge.sampling.samplers.safe import density_of

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.densities.base import HarmDensity
    from expunge.sampling.denoiser_hook import Denoising, Guidance


@dataclass(frozen=True)
class Classifier(Sampler):
    """Every step is led down the harm density of the picture that it predicts, through the UNet.

    ε' = ε + √(1−ᾱ_t) γ ∇_{x_t} log p_h(x̂0(x_t)), x̂0 from ε under guidance. It is the dearest of
    all: a second forward and a backward through the UNet, both branches of it.

    Attributes:
        strength: γ.
        gate: Only where p_h ≥ η; otherwise wherever p_h > 0.
        density: p_h.
        decoder: From x̂0 to the picture that p_h sees.
    """

    strength: float = 1.0
    gate: bool = False
    density: Annotated[Any, DENSITIES] = field(
        default_factory=lambda: DENSITIES.load("clip_text")()
    )
    decoder: Annotated[Any, DECODERS] = field(default_factory=lambda: DECODERS.load("vae")())

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"got strength {self.strength}; allowed: 0 or more")

    def wrap(self, pipeline: Any, concept: Concept | None) -> Any:
        """The pipeline under the density of the concept, and the decoder of its latents."""
        density = density_of(self.density, self.require(concept), pipeline)
        decode = self.decoder.build(pipeline)
        return classifier_guidance(pipeline, density, decode, self.strength, self.gate)

    def identity(self, pipeline: Any, concept: Concept | None) -> dict[str, Any]:
        """The weights of density and decoder."""
        density = density_of(self.density, self.require(concept), pipeline)
        return {"density": density.identity(), "decoder": self.decoder.build(pipeline).sha256()}


def classifier_guidance(
    pipeline: Any,
    density: HarmDensity,
    decode: Callable[[Tensor], Tensor],
    strength: float = 1.0,
    gate: bool = False,
) -> Any:
    """A copy of a pipeline under negative classifier guidance by any density and decoder.

    Args:
        pipeline: Of diffusers, with a UNet.
        density: p_h, on the pipeline's device.
        decode: Latents (B, C, h, w) to pictures (B, 3, H, W) in [-1, 1], differentiable.
        strength: γ, 0 or more.
        gate: Only where p_h ≥ η; otherwise wherever p_h > 0.
    """
    from expunge.sampling.denoiser_hook import Guidance, guide_denoiser

    def guided(call: Denoising) -> Tensor | None:
        import torch

        from expunge.prediction import to_x0

        with torch.no_grad():
            harm = density(decode(to_x0(call.plain, call.x_t, call.ᾱ)))
            # log p_h has no gradient where there is nothing of the concept to be seen.
            asked = harm.exceeds(density.thresholds) & (harm.score > 0) if gate else harm.score > 0
        rows = asked.nonzero().flatten()
        if not len(rows):
            return None
        g = harm_gradient(call, rows, density, decode)
        ε = call.plain
        ε[rows] += strength * (1 - call.ᾱ[rows]).sqrt().view(-1, 1, 1, 1) * g
        return ε

    def start(pipeline: Any, arguments: Mapping[str, Any]) -> Guidance:
        return Guidance(guided=guided)

    return guide_denoiser(pipeline, start)


def harm_gradient(
    call: Denoising, rows: Tensor, density: HarmDensity, decode: Callable[[Tensor], Tensor]
) -> Tensor:
    """∇_{x_t} log p_h(x̂0(x_t)), (R, C, h, w), of some samples.

    The gradient at x̂0 is pulled back through x̂0(x_t) = (x_t − √(1−ᾱ) ε(x_t)) / √ᾱ, UNet included.
    """
    import torch

    from expunge import guidance
    from expunge.prediction import guide, to_x0

    with torch.enable_grad():
        x_t = call.x_t[rows].detach().requires_grad_()
        x0 = to_x0(guide(*call.pair(x_t, rows), call.s), x_t, call.ᾱ[rows])
        at_x0 = guidance.gradient(x0.detach(), density, decode)
        (g,) = torch.autograd.grad(x0, x_t, at_x0)
    if not torch.isfinite(g).all():
        raise FloatingPointError("the gradient of log p_h through the UNet is NaN or infinite")
    return g
