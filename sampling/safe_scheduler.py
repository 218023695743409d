"""A guarded scheduler: any diffusers scheduler whose `step` corrects x̂0 first."""

from __future__ import annotations

import copy
import functools
from typing import Any, Protocol

import torch
from torch import Tensor

from expunge import prediction
from expunge.errors import UserError
from expunge.sampling.graft import graft


class Corrector(Protocol):
    """Whoever decides by how much x̂0 is moved.

    Attributes:
        keeps_noise: Under DDIM the predicted noise stays as it is.
    """

    keeps_noise: bool

    def correction(self, scheduler: Any, prediction: Tensor, t: Any, x_t: Tensor) -> Tensor | None:
        """Δx̂0 (B, C, h, w), zero where nothing is to be done; None where nothing is at all."""


class SafeScheduler:
    """What is laid over a scheduler's class; the rest of it stays as it is, its name included.

    Under DDIM a corrector that `keeps_noise` moves x̂0 alone, as published (arXiv 2505.08817):
    x_{t−1} = √ᾱ_{t−1} (x̂0 + Δ) + √(1 − ᾱ_{t−1} − σ²) ε + σ z.
    Otherwise, and under every other scheduler, the step is given the prediction that belongs to
    x̂0 + Δ, so that the history of a multistep solver holds corrected predictions too. Without a
    correction the scheduler's own `step` sees what it would have seen, bit by bit, and samples that
    are not corrected keep theirs.
    """

    corrector: Corrector

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kw: Any
    ) -> Any:
        """The scheduler's own step, after x̂0 has been corrected."""
        from diffusers import DDIMScheduler

        Δ = self.corrector.correction(self, model_output, timestep, sample)
        step = super().step  # type: ignore[misc]
        if Δ is None:
            return step(model_output, timestep, sample, *args, **kw)
        if self.corrector.keeps_noise and isinstance(self, DDIMScheduler):
            done = step(model_output, timestep, sample, *args, **kw)
            return _moved(done, Δ, prediction.previous_alpha_bar(self, timestep) ** 0.5)
        slope = prediction.level(self, timestep).slope
        corrected = _add(model_output, slope * Δ)
        moved = Δ.flatten(1).any(1).view(-1, 1, 1, 1)
        return step(torch.where(moved, corrected, model_output), timestep, sample, *args, **kw)


def safe_scheduler(scheduler: Any, corrector: Corrector) -> Any:
    """A copy of a scheduler that lets `corrector` move x̂0; `save_pretrained` writes a plain one.

    Raises:
        UserError: Corrections do not reach the samples of this scheduler.
    """
    if isinstance(scheduler, SafeScheduler):
        raise UserError("got a scheduler that is guarded already; allowed: one guard a pipeline")
    safe: Any = graft(copy.deepcopy(scheduler), SafeScheduler)

    # Pipelines read the signature to see whether a scheduler takes eta or a generator.
    @functools.wraps(type(scheduler).step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return SafeScheduler.step(self, *args, **kwargs)

    type(safe).step = step
    with torch.random.fork_rng(devices=[]):
        _probe(safe, scheduler)
    safe.corrector = corrector
    return safe


class _Towards:
    """Corrects every x̂0 onto one picture."""

    keeps_noise = True

    def __init__(self, wanted: Tensor) -> None:
        self.wanted = wanted

    def correction(self, scheduler: Any, prediction_: Tensor, t: Any, x_t: Tensor) -> Tensor:
        return self.wanted - prediction.level(scheduler, t).x0(prediction_, x_t)


def _probe(safe: Any, scheduler: Any) -> None:
    """Refuse a scheduler whose samples do not follow x̂0.

    A sampler whose every x̂0 is corrected onto one and the same picture must end near it; here the
    network believes in a picture beside it.
    """
    generator = torch.Generator().manual_seed(0)
    wanted, noise, beside = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(3))
    probe: Any = copy.copy(safe)
    probe.corrector = _Towards(wanted)
    try:
        # The values of a probe must not stay behind in the scheduler.
        probe = copy.deepcopy(probe)
        probe.set_timesteps(8)
        x = noise * getattr(probe, "init_noise_sigma", 1.0)
        for t in probe.timesteps:
            if hasattr(probe, "scale_model_input"):
                probe.scale_model_input(x, t)
            believed = prediction.level(probe, t).prediction(wanted + 0.1 * beside, x)
            x = probe.step(believed, t, x).prev_sample
        error = float((x - wanted).square().mean().sqrt())
    except UserError:
        raise
    except Exception as cause:  # whatever a foreign scheduler raises, it cannot be guarded
        raise UserError(
            f"got scheduler {type(scheduler).__name__}, which failed a trial "
            f"({type(cause).__name__}: {cause}); choose another scheduler"
        ) from cause
    if not error < 0.25:
        raise UserError(
            f"got scheduler {type(scheduler).__name__}, whose samples miss the corrected picture "
            f"by {error:.2f}; allowed: one that samples from its x̂0, as DDIM, Euler or "
            "DPM-Solver++; choose another scheduler"
        )


def _moved(done: Any, Δ: Tensor, scale: float) -> Any:
    """A DDIM step's output with x̂0 moved by Δ and x_{t−1} by `scale` · Δ."""
    changes = (scale * Δ, Δ)
    if isinstance(done, tuple):
        return tuple(_add(v, change) for v, change in zip(done, changes, strict=True))
    return type(done)(
        prev_sample=_add(done.prev_sample, changes[0]),
        pred_original_sample=_add(done.pred_original_sample, changes[1]),
    )


def _add(x: Tensor, change: Tensor) -> Tensor:
    return (x + change).to(x.dtype)  # in the wider type of the two, then as it was
