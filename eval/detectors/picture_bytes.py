"""Pictures as the bytes that published detectors read from files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """Pictures (B, 3, H, W) in [-1, 1] as RGB bytes (B, H, W, 3), rounded to nearest.

    Raises:
        ValueError: Pictures of another shape.
        FloatingPointError: NaN or infinite values, of which no byte can be made.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"got pictures of shape {tuple(images.shape)}; allowed: (B, 3, H, W)")
    if not images.isfinite().all():
        raise FloatingPointError("got pictures that hold NaN or infinite values")
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    found: NDArray[np.uint8] = scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return found
