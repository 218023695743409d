r"""Conversions between what a network predicts and what the algorithms see.

A diffusion model sees x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε and predicts ε, v = √ᾱ_t ε − √(1−ᾱ_t) x_0
(arXiv 2202.00512) or x_0 itself. Objectives and samplers work on ε and x̂0 only; they are converted
here, at the boundary. All tensors are (B, C, h, w); ᾱ is (B,).
"""

from typing import Any

import torch
from torch import Tensor

from expunge.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def alpha_bar(scheduler: Any, t: Tensor) -> Tensor:
    """ᾱ_t of a diffusers scheduler's training noise schedule, (B,) for timesteps t (B,)."""
    table: Tensor = scheduler.alphas_cumprod.to(t.device)
    return table[t]


def prediction_type(scheduler: Any) -> str:
    """What the network behind this scheduler predicts.

    Raises:
        UserError: A kind of prediction that has no conversion here.
    """
    kind: str = scheduler.config.prediction_type
    if kind not in PREDICTION_TYPES:
        raise UserError(
            f"got prediction type {kind!r}; allowed: {', '.join(PREDICTION_TYPES)}; "
            "choose an SD 1.x or SD 2.x model"
        )
    return kind


def to_epsilon(prediction: Tensor, x_t: Tensor, ᾱ: Tensor, kind: str) -> Tensor:
    """ε from a prediction: ε; √ᾱ v + √(1−ᾱ) x_t; (x_t − √ᾱ x_0) / √(1−ᾱ)."""
    a, b = _coefficients(ᾱ, x_t)
    if kind == "epsilon":
        return prediction
    if kind == "v_prediction":
        return a * prediction + b * x_t
    if kind == "sample":
        return (x_t - a * prediction) / b
    raise ValueError(f"got {kind!r}; allowed: {PREDICTION_TYPES}")


def to_x0(ε: Tensor, x_t: Tensor, ᾱ: Tensor) -> Tensor:
    """x̂0 = (x_t − √(1−ᾱ) ε) / √ᾱ."""
    a, b = _coefficients(ᾱ, x_t)
    return (x_t - b * ε) / a


def from_epsilon(ε: Tensor, x_t: Tensor, ᾱ: Tensor, kind: str) -> Tensor:
    """What a network of this kind would have predicted: the inverse of `to_epsilon`."""
    a, b = _coefficients(ᾱ, x_t)
    if kind == "epsilon":
        return ε
    if kind == "v_prediction":
        return (ε - b * x_t) / a
    if kind == "sample":
        return (x_t - b * ε) / a
    raise ValueError(f"got {kind!r}; allowed: {PREDICTION_TYPES}")


def guide(e_null: Tensor, e_prompt: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, ẽ = e0 + s (ep − e0) (arXiv 2207.12598)."""
    return e_null + guidance_scale * (e_prompt - e_null)


def _coefficients(ᾱ: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
    ᾱ = ᾱ.to(x_t.dtype).view(-1, 1, 1, 1)
    return torch.sqrt(ᾱ), torch.sqrt(1 - ᾱ)
