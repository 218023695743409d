"""The x̂0 predictions of a pipeline while it samples: what a density gets to see."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expunge.prediction import prediction_type


def stage_steps(stages: int, steps: int) -> list[int]:
    """Indices of the denoising steps that are looked at: evenly spaced, the last among them."""
    if stages == 1:
        return [steps - 1]
    return [round(k * (steps - 1) / (stages - 1)) for k in range(stages)]


@torch.no_grad()
def predicted_x0(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    stages: int,
    batch_size: int = 16,
    done: Callable[[int], Any] = lambda n: None,
) -> Tensor:
    """x̂0 at several stages of denoising, (S, N, C, h, w), float32 on the CPU.

    The pipeline samples by itself, with DDIM over its own noise schedule (arXiv 2010.02502), so
    that any text-to-image pipeline will do. The last stage is the finished latent.

    Args:
        pipeline: Any diffusers text-to-image pipeline.
        prompts: N prompts.
        seeds: N seeds; a sample depends on its own prompt and seed alone.
        steps: Denoising steps.
        guidance_scale: s of classifier-free guidance.
        stages: S.
        batch_size: Pictures at a time.
        done: Called with the number of pictures after each batch.

    Raises:
        FloatingPointError: The model predicts NaN.
    """
    wanted = stage_steps(stages, steps)
    parts = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        with _watched(pipeline) as seen:
            pipeline(
                list(prompts[part]),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="latent",
            )
        parts.append(torch.stack([seen[index] for index in wanted]))
        done(parts[-1].shape[1])
    latents = torch.cat(parts, dim=1)
    if not torch.isfinite(latents).all():
        raise FloatingPointError("the model predicted NaN latents")
    return latents


@contextmanager
def _watched(pipeline: Any) -> Iterator[list[Tensor]]:
    """Give the pipeline a DDIM scheduler that keeps its predictions, and its own one back after."""
    from diffusers import DDIMScheduler

    own = pipeline.scheduler
    prediction_type(own)
    # What a density sees is the prediction itself, neither clipped nor thresholded.
    ddim = DDIMScheduler.from_config(own.config, clip_sample=False, thresholding=False)
    step, seen = ddim.step, list[Tensor]()

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        prev_sample, x0 = step(*args, **{**kwargs, "return_dict": False})
        seen.append(x0.float().cpu())
        return prev_sample, x0

    ddim.step = watched
    pipeline.scheduler = ddim
    try:
        yield seen
    finally:
        pipeline.scheduler = own
