"""What a UNet is told besides x_t and t: the text, and with SDXL a pooled text and sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge import backbones


@dataclass(frozen=True)
class Conditioning:
    """The conditions of B samples; it is indexed, joined and moved as one tensor would be.

    Attributes:
        states: Text embeddings, (B, T, D).
        pooled: The pooled text of SDXL's second encoder, (B, D'); None for other models.
        sizes: SDXL's micro-conditioning, (B, 6): height and width of the original, upper left
            corner of the crop, height and width of the picture (arXiv 2307.01952); None as well.
    """

    states: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Conditioning:
        return self._each(lambda x: x[rows])

    def expand(self, n: int) -> Conditioning:
        """One sample's conditions for n samples."""
        return self._each(lambda x: x.expand(n, *x.shape[1:]))

    def to(self, *where: Any) -> Conditioning:
        """On another device, or in another precision."""
        return self._each(lambda x: x.to(*where))

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments for a diffusers UNet of that precision."""
        found: dict[str, Any] = {"encoder_hidden_states": self.states.to(dtype)}
        if self.pooled is not None:
            found["added_cond_kwargs"] = {
                "text_embeds": self.pooled.to(dtype),
                "time_ids": self.sizes,
            }
        return found

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """All samples of several, all with the same fields."""
        rest = [(part.pooled, part.sizes) for part in parts]
        pooled, sizes = ([x for x in column if x is not None] for column in zip(*rest, strict=True))
        return Conditioning(
            torch.cat([part.states for part in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat(sizes) if sizes else None,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(
            change(self.states),
            None if self.pooled is None else change(self.pooled),
            None if self.sizes is None else change(self.sizes),
        )


def condition(pipeline: Any, prompts: list[str], differentiable: bool = False) -> Conditioning:
    """What the pipeline itself gives its UNet for B prompts at the model's own size, in float32.

    The empty prompt is what stands for no prompt when the pipeline samples: SDXL was trained with
    zeros there, and its pipeline uses them (`force_zeros_for_empty_prompt`), not the encoded "".
    """
    with torch.set_grad_enabled(differentiable):
        states, pooled = backbones.encode(pipeline, prompts)
    states = states.float()
    if pooled is None:
        return Conditioning(states)
    pooled = pooled.float()
    if pipeline.config.force_zeros_for_empty_prompt:
        said = torch.tensor([bool(prompt) for prompt in prompts], device=states.device)
        states, pooled = states * said[:, None, None], pooled * said[:, None]
    _, h, w = backbones.latent_shape(pipeline)
    size = [h * pipeline.vae_scale_factor, w * pipeline.vae_scale_factor]
    sizes = torch.tensor([[*size, 0, 0, *size]] * len(prompts), dtype=torch.float32)
    return Conditioning(states, pooled, sizes.to(states.device))
