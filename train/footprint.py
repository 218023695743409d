"""What makes a run fit and go fast: a reduced base, 8-bit optimiser, offload, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from expunge import backbones
from expunge.errors import UserError

if TYPE_CHECKING:
    from expunge.train.config import TrainConfig

DTYPES = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "nf4": torch.bfloat16
}  # fmt: skip
RECOMPILATIONS = 64  # widths × adapter on or off × with or without gradient; torch's 8 is too few


def refuse(config: TrainConfig, device: torch.device, distribution: str = "NO") -> None:
    """Raise where this machine or its launcher cannot do what is asked, before anything is loaded.

    Args:
        config: What is asked.
        device: The accelerator.
        distribution: Accelerate's name of how processes work together.
    """
    if distribution in ("FSDP", "MEGATRON_LM", "XLA"):
        # They cut weights into pieces; teacher, average and export here read them whole.
        raise UserError(
            f"got accelerate's {distribution}; allowed: one process, DDP (MULTI_GPU, MULTI_CPU) or "
            "DEEPSPEED up to ZeRO-2; say --config_file configs/accelerate/multi_gpu.yaml"
        )
    eight, four = config.optimizer == "adamw8bit", config.base_precision == "nf4"
    if not (eight or four):
        return
    got = "optimizer adamw8bit" if eight else "base_precision nf4"
    instead = "optimizer adamw" if eight else "base_precision bf16"
    if device.type != "cuda":
        raise UserError(f"got {got} on {device.type}; allowed: on a CUDA device; say {instead}")
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"got {got} without bitsandbytes; allowed: with it; pip install -e '.[quant]', or "
            f"say {instead}"
        )


def load(config: TrainConfig, device: torch.device) -> Any:
    """The pipeline with its frozen weights in `base_precision`; the adapter is float32 always.

    nf4 (arXiv 2305.14314) holds the UNet's linear layers in 4 bits; all else is bfloat16.

    Raises:
        UserError: The model cannot be loaded, or is of another family than the configuration.
    """
    quantisation = None
    if config.base_precision == "nf4":
        from diffusers import PipelineQuantizationConfig

        quantisation = PipelineQuantizationConfig(
            quant_backend="bitsandbytes_4bit",
            quant_kwargs={
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": torch.bfloat16,
            },
            components_to_quantize=["unet"],
        )
    dtype = DTYPES[config.base_precision]
    pipeline = backbones.load_pipeline(config.model, dtype, str(device), quantisation)
    family = backbones.family_of(pipeline)
    if config.family not in (None, family):
        raise UserError(
            f"got model {config.model} of family {family} with settings for {config.family}; "
            f"allowed: a model of {config.family}; choose another model, or a configuration for "
            f"{family}"
        )
    return pipeline


def optimizer(config: TrainConfig, parameters: list[Any]) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), or with its two moments in 8 bits (arXiv 2110.02861)."""
    kind: Any = torch.optim.AdamW
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        kind = AdamW8bit
    made: torch.optim.Optimizer = kind(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    return made


class Lender:
    """Networks that live on the CPU and are lent to the accelerator while somebody needs them.

    Args:
        networks: Whose weights move.
        device: Where to.
    """

    def __init__(self, networks: list[Any], device: torch.device) -> None:
        self.networks, self.device = networks, device
        for network in networks:
            network.to("cpu")

    @contextmanager
    def lent(self) -> Iterator[None]:
        """They are on the device inside, and on the CPU again afterwards, however that ends."""
        try:
            for network in self.networks:
                network.to(self.device)
            yield
        finally:
            for network in self.networks:
                network.to("cpu")


def compile_blocks(unet: Any) -> None:
    """Compile the transformer blocks, which are all alike, so that compiling takes seconds.

    Every state of the adapter has its own compiled form and is found again by a guard.
    """
    from torch import _dynamo

    for name in ("recompile_limit", "cache_size_limit"):  # since and before torch 2.7
        if hasattr(_dynamo.config, name):
            setattr(_dynamo.config, name, RECOMPILATIONS)
    unet.compile_repeated_blocks()


@contextmanager
def compiler_needed() -> Iterator[None]:
    """Turn what torch says of a missing or broken compiler into one line."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except (TorchDynamoException, OSError) as error:
        line = next((x.strip() for x in str(error).splitlines() if x.strip()), repr(error))
        raise UserError(
            f"got compile true, and torch.compile failed ({line[:200]}); allowed: where it has a "
            "C++ compiler, and for GPUs triton; install g++, or say compile false"
        ) from error
