"""Erase concepts from the weights of a diffusion model."""

from expunge.registry import Entry, Registry

LATENTS = Registry(
    "latents policy",
    {
        "rollout": Entry(
            "expunge.train.latents:Rollout", "denoise partially at every step, as published"
        ),
    },
)
