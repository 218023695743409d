"""Plain sampling, reproducible by (prompt, seed) whatever the batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 16
PIXELS_AT_ONCE = 8 * 512 * 512  # a VAE's decoder holds about half a gigabyte for each 512²


def picture_size(pipeline: Any) -> tuple[int, int]:
    """(H, W) of the model's own pictures."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor


def pictures_at_once(pipeline: Any) -> int:
    """How many pictures of the model's own size a batch holds."""
    height, width = picture_size(pipeline)
    return max(1, min(AT_ONCE, PIXELS_AT_ONCE // (height * width)))


@contextmanager
def finite_pictures(pipeline: Any) -> Iterator[None]:
    """Inside, a decoder that gives NaN or infinities raises: the pipeline would clamp the latter.

    Raises:
        FloatingPointError: It did.
    """

    def check(module: Any, inputs: Any, images: Any) -> None:
        if not torch.isfinite(images[0] if isinstance(images, tuple) else images).all():
            raise FloatingPointError("the model made pictures that hold NaN or infinite values")

    handle = pipeline.vae.decoder.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int | None = None,
    size: tuple[int, int] | None = None,
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
        batch_size: Pictures at a time; default: 16, or as many as eight of SD 1.x have pixels.
        size: (H, W); default: the model's own.

    Raises:
        FloatingPointError: A picture holds NaN or infinities.
    """
    at_once = batch_size or pictures_at_once(pipeline)
    given = {} if size is None else {"height": size[0], "width": size[1]}
    parts = []
    for start in range(0, len(prompts), at_once):
        part = slice(start, start + at_once)
        with finite_pictures(pipeline):
            images = pipeline(
                list(prompts[part]),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="pt",
                **given,
            ).images
        parts.append(images.float().cpu() * 2 - 1)
    return torch.cat(parts)
