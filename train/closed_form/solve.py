"""Solve a closed form and put it into the UNet as a LoRA."""

from __future__ import annotations

import time
from typing import Any

import torch

from expunge import adapters, backbones
from expunge.train.closed_form.fitter import Edit
from expunge.train.config import TrainConfig
from expunge.train.loop import Progress


@torch.no_grad()
def solve(config: TrainConfig, pipeline: Any, progress: Progress) -> tuple[Edit, float]:
    """The edit, and the largest ‖ΔW − B A‖ / ‖ΔW‖ of any layer at the LoRA's rank.

    The UNet carries the LoRA afterwards, and `progress` the seconds.
    """
    begun = time.perf_counter()
    edit = config.objective.fit(pipeline, config.concept)
    names = backbones.modules_of(pipeline.unet, config.objective.modules)
    rank, alpha = config.lora.rank, config.lora.alpha
    adapters.attach(pipeline.unet, names, rank, alpha, config.seed)
    errors = []
    for name in names:
        layer = pipeline.unet.get_submodule(name)
        B, A, error = edit.lora(layer.base_layer.weight, rank)
        layer.lora_A[adapters.NAME].weight.copy_(A)
        layer.lora_B[adapters.NAME].weight.copy_(B * rank / alpha)
        errors.append(error)
    progress.seconds = time.perf_counter() - begun
    progress.forwards = {"teacher": 0, "student": 0, "sampling": 0}
    return edit, max(errors)
