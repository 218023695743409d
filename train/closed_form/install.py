"""Put the edit of a closed form into a UNet's LoRA."""

from __future__ import annotations

from typing import Any

import torch

from expunge import adapters
from expunge.errors import UserError
from expunge.train.closed_form.fitter import Edit

NOTHING = 1e-6  # of the longest row of A; what is shorter is a rounding error of the edit's rank


@torch.no_grad()
def install(edit: Edit, unet: Any, names: list[str], *, learns: bool = False) -> float:
    """Set B A of the named layers to what is nearest to the edit's ΔW at the LoRA's rank.

    Args:
        edit: What is put in.
        unet: With a LoRA as it begins.
        names: Of the layers.
        learns: Whether the LoRA is trained from there. Directions that the edit does not need
            then keep the A they began with: with A = B = 0 neither would ever have a gradient.

    Returns:
        The largest ‖ΔW − B A‖ / ‖ΔW‖ of any layer.

    Raises:
        UserError: The edit changes nothing.
    """
    if not (edit.P.any() and edit.Q.any()):
        raise UserError(
            "got a closed form that changes nothing: every target is read as its anchor already; "
            "allowed: an anchor of another meaning, or none; change concept.anchor"
        )
    errors = []
    for name in names:
        layer = unet.get_submodule(name)
        A, B = layer.lora_A[adapters.NAME].weight, layer.lora_B[adapters.NAME].weight
        b, a, error = edit.lora(layer.base_layer.weight, len(A))
        if learns:
            lengths = a.norm(dim=1)
            free = lengths <= NOTHING * lengths.max()
            a[free], b[:, free] = A[free].to(a), 0.0
        A.copy_(a)
        B.copy_(b / layer.scaling[adapters.NAME])
        errors.append(error)
    return max(errors)
