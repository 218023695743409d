"""Solve a closed form and put it into the UNet as a LoRA."""

from __future__ import annotations

import time
from typing import Any

from expunge import adapters, backbones
from expunge.train.closed_form.fitter import Edit
from expunge.train.closed_form.install import install
from expunge.train.config import TrainConfig
from expunge.train.loop import Progress


def solve(config: TrainConfig, pipeline: Any, progress: Progress) -> tuple[Edit, float]:
    """The edit, and the largest ‖ΔW − B A‖ / ‖ΔW‖ of any layer at the LoRA's rank.

    The UNet carries the LoRA afterwards, and `progress` the seconds.
    """
    begun = time.perf_counter()
    edit = config.objective.fit(pipeline, config.concept)
    names = backbones.modules_of(pipeline.unet, config.objective.modules)
    adapters.attach(pipeline.unet, names, config.lora.rank, config.lora.alpha, config.seed)
    lost = install(edit, pipeline.unet, names)
    progress.seconds = time.perf_counter() - begun
    return edit, lost
