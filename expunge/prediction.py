r"""Conversions between what a network predicts and what the algorithms see.

A diffusion model sees x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε and predicts ε, v = √ᾱ_t ε − √(1−ᾱ_t) x_0
(arXiv 2202.00512) or x_0 itself. Objectives and samplers work on ε and x̂0 only; they are converted
here, at the boundary. All tensors are (B, C, h, w); ᾱ is (B,).

Schedulers scale x_t each in its own way; while sampling, `level` tells x_t = α x_0 + σ ε at the
step that a scheduler is about to do, and everything else follows from α and σ.
"""

import math
from dataclasses import dataclass
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


def noised(x0: Tensor, ε: Tensor, ᾱ: Tensor) -> Tensor:
    """x_t = √ᾱ x_0 + √(1−ᾱ) ε."""
    a, b = _coefficients(ᾱ, x0)
    return a * x0 + b * ε


@dataclass(frozen=True)
class Level:
    """One step's noise level: x_t = α x_0 + σ ε, and what the network predicts there.

    Attributes:
        α: Share of the clean picture.
        σ: Share of the noise.
        kind: `epsilon`, `v_prediction`, `sample` or `flow_prediction`.
    """

    α: float
    σ: float
    kind: str

    def x0(self, prediction: Tensor, x_t: Tensor) -> Tensor:
        """x̂0 from a prediction; v belongs to x_t scaled to unit variance."""
        α, σ = self.α, self.σ
        if self.kind == "epsilon":
            return (x_t - σ * prediction) / α
        if self.kind == "v_prediction":
            n = math.hypot(α, σ)
            return α / n * (x_t / n) - σ / n * prediction
        if self.kind == "flow_prediction":
            return x_t - σ * prediction
        return prediction

    def prediction(self, x0: Tensor, x_t: Tensor) -> Tensor:
        """What a network that believes in x0 predicts: the inverse of `x0`."""
        α, σ = self.α, self.σ
        if self.kind == "epsilon":
            return (x_t - α * x0) / σ
        if self.kind == "v_prediction":
            n = math.hypot(α, σ)
            return (α * x_t / n - n * x0) / σ
        if self.kind == "flow_prediction":
            return (x_t - x0) / σ
        return x0

    @property
    def slope(self) -> float:
        """∂ prediction / ∂ x̂0 at fixed x_t: a correction Δ of x̂0 is `slope` · Δ in a prediction."""
        α, σ = self.α, self.σ
        return {
            "epsilon": -α / σ,
            "v_prediction": -math.hypot(α, σ) / σ,
            "flow_prediction": -1 / σ,
            "sample": 1.0,
        }[self.kind]


def level(scheduler: Any, t: Any) -> Level:
    """The noise level of the step that a diffusers scheduler is about to do at timestep t.

    Schedulers in σ keep a table of it: Euler's family has α = 1, solvers of the diffusion ODE
    (DPM-Solver++, UniPC, DEIS) say their own α, flow matching has α = 1 − σ. The others have ᾱ_t.

    Raises:
        UserError: A scheduler of none of these kinds.
    """
    flow = not hasattr(scheduler, "alphas_cumprod")
    kind = scheduler.config.get("prediction_type", "flow_prediction" if flow else None)
    if kind not in (*PREDICTION_TYPES, "flow_prediction"):
        raise UserError(f"got prediction type {kind!r}; allowed: {', '.join(PREDICTION_TYPES)}")
    if hasattr(scheduler, "sigmas") and hasattr(scheduler, "step_index"):
        σ = _sigma(scheduler, _index(scheduler, t))
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            α, σ = scheduler._sigma_to_alpha_sigma_t(σ)
            return Level(float(α), float(σ), kind)
        return Level(1 - float(σ) if flow else 1.0, float(σ), kind)
    if flow:
        raise UserError(
            f"got scheduler {type(scheduler).__name__}, which tells neither ᾱ nor σ; allowed: "
            "diffusers' DDIM, DDPM, PNDM, LCM, Euler, Heun, DPM-Solver, UniPC and the like"
        )
    ᾱ = float(scheduler.alphas_cumprod[int(t)])
    return Level(math.sqrt(ᾱ), math.sqrt(1 - ᾱ), kind)


def previous_alpha_bar(scheduler: Any, t: Any) -> float:
    """ᾱ of the timestep that a DDIM scheduler steps to from t."""
    before = int(t) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    ᾱ = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    return float(ᾱ)


def _sigma(scheduler: Any, index: int) -> Any:
    if hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order:
        # The second call of a step of KDPM2 is between two levels; the ancestral kind's index is
        # one ahead.
        return scheduler.sigmas_interpol[index - hasattr(scheduler, "sigmas_down")]
    return scheduler.sigmas[index]


def _index(scheduler: Any, t: Any) -> int:
    # None before the first step, when the scheduler has not looked the timestep up yet.
    index = scheduler.step_index
    if index is None:
        index = scheduler.begin_index
    return int(scheduler.index_for_timestep(t) if index is None else index)


def guide(e_null: Tensor, e_prompt: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, ẽ = e0 + s (ep − e0) (arXiv 2207.12598)."""
    return e_null + guidance_scale * (e_prompt - e_null)


def _coefficients(ᾱ: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
    ᾱ = ᾱ.to(x_t.dtype).view(-1, 1, 1, 1)
    return torch.sqrt(ᾱ), torch.sqrt(1 - ᾱ)
