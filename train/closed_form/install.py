"""Put the edit of a closed form into a UNet's LoRA."""

from __future__ import annotations

from typing import Any

import torch

from expunge import adapters
from expunge.errors import UserError
from expunge.train.closed_form.fitter import Edit


@torch.no_grad()
def install(edit: Edit, unet: Any, names: list[str]) -> float:
    """Set B A of the named layers to what is nearest to the edit's ΔW at the LoRA's rank.

    Returns:
        The largest ‖ΔW − B A‖ / ‖ΔW‖ of any layer.

    Raises:
        UserError: A layer has no LoRA.
    """
    errors = []
    for name in names:
        layer = unet.get_submodule(name)
        if adapters.NAME not in getattr(layer, "lora_A", {}):
            raise UserError(
                f"got a LoRA without {name}, which the closed form changes; allowed: lora.targets "
                "x, x-strict or all"
            )
        A, B = layer.lora_A[adapters.NAME].weight, layer.lora_B[adapters.NAME].weight
        b, a, error = edit.lora(layer.base_layer.weight, len(A))
        A.copy_(a)
        B.copy_(b / layer.scaling[adapters.NAME])
        errors.append(error)
    return max(errors)
