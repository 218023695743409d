"""How much LoRA trained apart disturb each other: in their weights, and in what they do."""

import math
from typing import Any

from torch import Tensor

from expunge.exporting.deltas import Layers, product


def in_weights(one: Layers, other: Layers) -> dict[str, Any]:
    """cos(ΔA, ΔB) and ‖ΔA + ΔB‖ beside each alone, in every layer that both change, and over all.

    Orthogonal changes (cosine 0) keep out of each other's way; at -1 they cancel.
    """
    layers = {}
    for name in [name for name in one if name in other]:
        a, b = one[name], other[name]
        layers[name] = _compare(product(a, a), product(b, b), product(a, b))
    aa = sum(product(delta, delta) for delta in one.values())
    bb = sum(product(delta, delta) for delta in other.values())
    ab = sum(product(one[name], other[name]) for name in layers)
    worst = max(layers, key=lambda name: abs(layers[name]["cosine"]), default=None)
    return {
        "shared_layers": len(layers),
        **_compare(aa, bb, ab),
        "worst_layer": worst,
        "layers": layers,
    }


def _compare(aa: float, bb: float, ab: float) -> dict[str, float]:
    norm = math.sqrt(aa * bb)
    return {
        "norm_one": math.sqrt(aa),
        "norm_other": math.sqrt(bb),
        "norm_sum": math.sqrt(max(aa + bb + 2 * ab, 0.0)),
        "cosine": ab / norm if norm else 0.0,
    }


def in_latents(base: Tensor, alone: Tensor, together: Tensor) -> float:
    """‖together − alone‖ / ‖alone − base‖: how far the others move what one does by itself."""
    return float((together - alone).norm() / (alone - base).norm().clamp(min=1e-30))
