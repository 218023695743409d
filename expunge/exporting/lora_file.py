"""A LoRA as diffusers writes it."""

from pathlib import Path
from typing import Any

import torch

from expunge import adapters
from expunge.exporting.deltas import Layers, uniform
from expunge.exporting.readback import digest


def write(
    layers: Layers, folder: Path, dtype: torch.dtype, about: dict[str, Any]
) -> dict[str, str]:
    """Write `pytorch_lora_weights.safetensors`, the alpha in its head.

    Returns:
        The file's name and the digest of the tensors that it should hold.
    """
    layers = uniform(layers)
    tensors = {}
    for name, delta in layers.items():
        tensors[f"unet.{name}.lora_A.weight"] = delta.A.to(dtype).contiguous()
        tensors[f"unet.{name}.lora_B.weight"] = delta.B.to(dtype).contiguous()
    one = next(iter(layers.values()))
    config = {"r": one.rank, "lora_alpha": one.alpha, "target_modules": list(layers)}
    adapters.write(tensors, folder / adapters.FILE, adapters.diffusers_header(config, about))
    return {adapters.FILE: digest(tensors)}
