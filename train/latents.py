"""Where the noisy latents x_t of a training step come from."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from expunge import prediction
from expunge.train.predictions import Inputs, Networks


@dataclass(frozen=True)
class Rollout:
    """Denoise from pure noise for k ~ U{1 … steps − 1} steps, anew at every training step.

    DDIM with η = 0 (arXiv 2010.02502) and classifier-free guidance; t is then drawn uniformly from
    the bin of training timesteps that step k stands for, as published for ESD and SDD.

    Attributes:
        steps: Steps of the whole denoising.
        guidance_scale: s of classifier-free guidance.
        source: Who denoises: the frozen `teacher`, the `student`, or its average `ema`.
    """

    steps: int = 50
    guidance_scale: float = 3.0
    source: Literal["teacher", "student", "ema"] = "teacher"

    def __post_init__(self) -> None:
        if not 2 <= self.steps <= 1000:
            raise ValueError(f"got latents.steps {self.steps}; allowed: 2 to 1000; papers use 50")

    @torch.no_grad()
    def draw(
        self,
        networks: Networks,
        embeddings: Tensor,
        null: Tensor,
        shape: tuple[int, int, int],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """x_t (B, C, h, w) and t (B,) for B prompts, on the embeddings' device.

        Args:
            networks: Who denoises.
            embeddings: The prompts, (B, T, D).
            null: The prompt of the unconditional prediction, (1, T, D).
            shape: (C, h, w).
            generator: On the CPU; all randomness comes from it.
        """
        batch, device = len(embeddings), embeddings.device
        scheduler = _ddim(networks.scheduler, self.steps)
        k = int(torch.randint(1, self.steps, (), generator=generator))
        x_t = torch.randn((batch, *shape), generator=generator).to(device, embeddings.dtype)
        both = torch.cat([null.expand_as(embeddings), embeddings])
        network = "student_sg" if self.source == "student" else self.source
        for t in scheduler.timesteps[:k]:
            inputs = Inputs(torch.cat([x_t, x_t]), t.expand(2 * batch).to(device), both)
            # Guidance is linear, so it may act on ε, v or x_0 alike.
            null_raw, prompt_raw = networks.raw(network, inputs).chunk(2)
            networks.forwards["sampling"] += 2 * batch
            raw = prediction.guide(null_raw, prompt_raw, self.guidance_scale)
            x_t = scheduler.step(raw, t, x_t).prev_sample
        # x_t now has the noise of the next timestep; its bin reaches up to the one just done.
        low, high = int(scheduler.timesteps[k]), int(scheduler.timesteps[k - 1])
        return x_t, torch.randint(low, high, (batch,), generator=generator).to(device)


def _ddim(scheduler: Any, steps: int) -> Any:
    from diffusers import DDIMScheduler

    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    ddim.set_timesteps(steps)
    return ddim
