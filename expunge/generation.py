"""Plain sampling, reproducible by (prompt, seed) whatever the batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int = 16,
) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] on the CPU, one for each prompt and seed.

    Every picture has its own CPU generator, so that its noise depends on its seed alone: not on
    the batch, the order or the device.

    Args:
        pipeline: Any diffusers text-to-image pipeline.
        prompts: N prompts.
        seeds: N seeds.
        steps: Denoising steps.
        guidance_scale: s in ẽ = e0 + s (ep − e0).
        batch_size: Pictures at a time.

    Raises:
        FloatingPointError: A picture holds NaN.
    """
    parts = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        images = pipeline(
            list(prompts[part]),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        ).images
        parts.append(images.float().cpu() * 2 - 1)
    pictures = torch.cat(parts)
    # The pipeline clamps infinities away; only NaN gets here.
    if not torch.isfinite(pictures).all():
        raise FloatingPointError("the model produced NaN pictures")
    return pictures
