"""Proof that what was written does what the adapter does: latents, and every tensor's bits."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from expunge.errors import UserError

TOLERANCE = 1e-4  # of the latents' scale; float32 in another order of summation needs 1e-5
ROUNDING = 4.0  # machine epsilons by which latents may move where weights were rounded
SHARE = 0.25  # of what the adapter does, which no difference may exceed


@torch.no_grad()
def latents(
    pipeline: Any, prompts: Sequence[str], *, seed: int, steps: int, guidance_scale: float
) -> Tensor:
    """Final latents (N, C, h, w) of a few denoising steps, float32 on the CPU."""
    # TF32 is 10 bits: two orders of the same sum would differ by more than what is looked for.
    with torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, benchmark=False, allow_tf32=False
    ):
        found: Tensor = pipeline(
            list(prompts),
            generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
    return found.float().cpu()


@dataclass(frozen=True)
class Comparison:
    """Latents of the base, of the adapter in place, and of what was read back.

    Attributes:
        difference: max|read back − in place| / max|in place|.
        allowed: What `difference` may be.
        effect: max|in place − base| / max|in place|, what the adapter does.
    """

    difference: float
    allowed: float
    effect: float

    @property
    def holds(self) -> bool:
        """Whether it is close, and closer than doing nothing would be; NaN is neither."""
        return self.difference <= min(self.allowed, SHARE * self.effect)


def compare(base: Tensor, in_place: Tensor, found: Tensor, dtype: torch.dtype) -> Comparison:
    """How far what was read back is from the adapter in place, if weights were kept in `dtype`."""
    scale = in_place.abs().max()
    rounded = dtype != torch.float32
    return Comparison(
        difference=float((found - in_place).abs().max() / scale),
        allowed=ROUNDING * torch.finfo(dtype).eps if rounded else TOLERANCE,
        effect=float((in_place - base).abs().max() / scale),
    )


def require(comparison: Comparison, dtype: torch.dtype) -> None:
    """Raise unless the comparison holds.

    Raises:
        UserError: The adapter does nothing that could be compared, or rounding drowns it.
        RuntimeError: What was written is not what it should be.
    """
    if comparison.holds:
        return
    difference, effect = comparison.difference, comparison.effect
    told = (
        f"latents differ by {difference:.1e} of their scale, the adapter's effect is {effect:.1e}"
    )
    if difference <= comparison.allowed:
        advice = "train it longer" if dtype == torch.float32 else "say --dtype float32"
        raise UserError(
            f"got an adapter too weak to tell from rounding to {str(dtype)[6:]}: {told}; allowed: "
            f"an effect {1 / SHARE:g} times the difference; {advice}"
        )
    raise RuntimeError(
        f"what was read back is not what was exported: {told}; allowed: {comparison.allowed:.1e}"
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bits, whatever their order."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def require_written(folder: Path, digests: Mapping[str, str]) -> int:
    """Raise unless every safetensors file holds, bit for bit, the tensors that were meant.

    Returns:
        How many tensors that are.
    """
    count = 0
    for name, meant in digests.items():
        tensors = load_file(folder / name)
        if digest(tensors) != meant:
            raise RuntimeError(f"{name} on the disk does not hold what was written")
        count += len(tensors)
    return count
