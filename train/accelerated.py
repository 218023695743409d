"""The accelerator of a run: what the launcher says and the configuration says must be one."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.errors import UserError

if TYPE_CHECKING:
    from expunge.train.config import TrainConfig

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"  # accelerate obeys it and not its caller


def accelerator_of(config: TrainConfig, folder: Path) -> Any:
    """The `Accelerator`, which logs into the folder.

    Raises:
        UserError: The launcher asks for something else than the configuration, or for what this
            machine has not.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    told = os.environ.get(ACCUMULATION, str(config.gradient_accumulation))
    if told != str(config.gradient_accumulation):
        raise UserError(
            f"got gradient_accumulation {config.gradient_accumulation}, and {told} from the "
            "launcher; allowed: the same; leave gradient_accumulation_steps out of the "
            f"launcher's configuration ({ACCUMULATION})"
        )
    try:
        return Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation,
            mixed_precision=config.mixed_precision,
            log_with="tensorboard",
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder)),
            # While one process draws pictures or writes, the others wait: NCCL gives it 10 minutes.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
        )
    except ValueError as error:
        if "precision" not in str(error):
            raise
        raise UserError(
            f"got mixed_precision {config.mixed_precision} ({error}); allowed on this machine: no, "
            "and bf16 where its processor has it"
        ) from error
    except ImportError as error:
        raise UserError(
            f"got a launcher that asks for what is not installed ({error}); allowed: what is; "
            "install it, or say --config_file configs/accelerate/multi_gpu.yaml"
        ) from error


def settle(settings: dict[str, Any], config: TrainConfig) -> None:
    """Write into DeepSpeed's settings what the configuration decides; it has its own of each.

    Args:
        settings: As accelerate's plugin holds them, before anything is prepared.
        config: The run.
    """
    settings["train_micro_batch_size_per_gpu"] = config.batch_size  # else it looks for a loader
    settings["gradient_accumulation_steps"] = config.gradient_accumulation
    # It clips itself; 0 is not at all.
    settings["gradient_clipping"] = (
        0.0 if math.isinf(config.max_grad_norm) else config.max_grad_norm
    )
