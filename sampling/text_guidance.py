r"""Guidance by texts, as pure functions of predictions.

Letters: e0, ep, eh are a network's ε without a prompt, with the prompt and with the text of what is
to be gone, all (B, C, h, w); s is the scale of classifier-free guidance. Every sample of a batch is
computed by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.prediction import guide


@dataclass(frozen=True)
class SldStrength:
    """How strongly SLD acts (arXiv 2211.05105, table of hyperparameters).

    Attributes:
        warmup: δ, the steps at the start that stay unguided, 0 or more.
        scale: s_S, 0 or more; 0 guides nothing.
        threshold: λ; the larger, the more of the picture is guided.
        momentum_scale: s_m, in [0, 1].
        momentum: β, in [0, 1).
    """

    warmup: int
    scale: float
    threshold: float
    momentum_scale: float
    momentum: float


SLD_PRESETS = {
    "weak": SldStrength(15, 20.0, 0.0, 0.0, 0.0),
    "medium": SldStrength(10, 1000.0, 0.01, 0.3, 0.4),
    "strong": SldStrength(7, 2000.0, 0.025, 0.5, 0.7),
    "max": SldStrength(0, 5000.0, 1.0, 0.5, 0.7),
}


def sld(
    e0: Tensor, ep: Tensor, eh: Tensor, s: float, ν: Tensor, step: int, how: SldStrength
) -> tuple[Tensor, Tensor]:
    """Safe latent diffusion: ε and the next momentum, both (B, C, h, w) (arXiv 2211.05105).

    μ = min(1, s_S |ep − eh|) where ep − eh < λ, else 0, element by element; what is compared with
    λ is the difference with its sign, not its size.
    g = μ (eh − e0) + s_m ν, and ν ← β ν + (1 − β) g in every step, also while it warms up.
    ε = e0 + s ((ep − e0) − g) from step δ on, before it plain guidance.

    Args:
        e0: ε without a prompt.
        ep: ε with the prompt.
        eh: ε with the text of what is to be gone.
        s: Scale of classifier-free guidance.
        ν: (B, C, h, w), zero at the start.
        step: Index of the denoising step, from 0.
        how: s_S, λ, s_m, β and δ.
    """
    d = ep - eh
    μ = torch.where(d < how.threshold, (how.scale * d.abs()).clamp(max=1.0), torch.zeros_like(d))
    g = μ * (eh - e0) + how.momentum_scale * ν
    ν = how.momentum * ν + (1 - how.momentum) * g
    if step < how.warmup:
        return guide(e0, ep, s), ν
    return e0 + s * ((ep - e0) - g), ν


def negative(ep: Tensor, eh: Tensor, s: float) -> Tensor:
    """ε = eh + s (ep − eh): the negative prompt takes the place of the empty one."""
    return guide(eh, ep, s)


def away(e0: Tensor, ep: Tensor, eh: Tensor, s: float, w: float) -> Tensor:
    """ε = e0 + s ((ep − e0) − w (eh − e0)): a negative prompt with a weight of its own.

    With w = (s − 1)/s it is the usual negative prompt, ε = eh + s (ep − eh); w = 0 is plain
    guidance.
    """
    return e0 + s * ((ep - e0) - w * (eh - e0))


def conditional_half(e0: Tensor, ep: Tensor, wanted: Tensor, s: float) -> Tensor:
    """The ep' for which a pipeline's own formula gives what is wanted: e0 + s (ep' − e0) = ε.

    It is ep + (ε − ε_plain)/s, and so to the bit ep itself wherever ε is plain guidance.
    """
    return ep + (wanted - guide(e0, ep, s)) / s
