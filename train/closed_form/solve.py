"""Solve a closed form and put it into the UNet as a LoRA."""

from __future__ import annotations

import time
from typing import Any

from expunge import adapters, backbones
from expunge.train.closed_form.fitter import Edit
from expunge.train.closed_form.install import install
from expunge.train.config import TrainConfig
from expunge.train.loop import Progress


def solve(config: TrainConfig, pipeline: Any, progress: Progress) -> Edit:
    """The edit, which the UNet carries as a LoRA afterwards.

    `progress` has the seconds, and the largest ‖ΔW − B A‖ / ‖ΔW‖ of any layer at the LoRA's rank.
    """
    begun = time.perf_counter()
    edit: Edit = config.objective.fit(pipeline, config.concept)
    names = backbones.modules_of(pipeline.unet, config.objective.modules)
    adapters.attach(pipeline.unet, names, config.lora.rank, config.lora.alpha, config.seed)
    progress.svd_error = install(edit, pipeline.unet, names)
    progress.seconds = time.perf_counter() - begun
    return edit
