"""−γ · 1[p_h ≥ η] · ∇log p_h: the one place that says how x̂0 is moved away from harm.

The published scheme (arXiv 2505.08817) takes γ as it is; `normalised` strength follows MPGD
(arXiv 2311.16424). A raw CLIP gradient is adversarial: it lowers CLIP's own score and leaves the
object in the picture. What is done about it is in `views` and `smooth`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.densities.base import HarmDensity

Decode = Callable[[Tensor], Tensor]


def log_density(score: Tensor) -> Tensor:
    """The logarithm of p_h, (B,); constant 0 where p_h ≤ 0, as a cosine can be.

    There nothing is left to descend, and the gradient is zero.
    """
    return torch.where(score > 0, score, 1.0).log()


def gradient(
    x0: Tensor, density: HarmDensity, decode: Decode, copies: int = 1, seed: int = 0
) -> Tensor:
    """∇_{x̂0} log p_h(D(x̂0)), (B, C, h, w), the mean over `copies` altered views of the picture.

    Raises:
        FloatingPointError: It is NaN or infinite; or it is zero where p_h > 0, of a density that is
            saturated there, so that the picture could not be corrected.
    """
    # A pipeline samples without gradient, some callers in inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        x = x0.detach().clone().requires_grad_()
        images = decode(x)
        scores = torch.stack(
            [density(view(images, seed + i) if copies > 1 else images).score for i in range(copies)]
        )
        (g,) = torch.autograd.grad(log_density(scores).mean(0).sum(), x)
    if not torch.isfinite(g).all():
        raise FloatingPointError("the gradient of log p_h is NaN or infinite")
    if ((scores > 0).any(0) & ~g.flatten(1).any(1)).any():
        raise FloatingPointError(
            "the gradient of log p_h is zero where p_h is not: the density is saturated, and the "
            "picture cannot be corrected"
        )
    return g


def view(images: Tensor, seed: int, noise: float = 0.1) -> Tensor:
    """One altered view of pictures: shifted and zoomed, blurred, and under noise.

    What a view loses or gains differs from view to view, what the picture shows does not; so the
    mean gradient over views keeps the latter. All pictures of a batch are altered alike, so that
    none depends on its neighbours.

    Args:
        images: (B, 3, H, W).
        seed: Decides the view.
        noise: Standard deviation of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    zoom, right, down, blur = torch.rand(4, generator=generator).tolist()
    scale = 0.8 + 0.25 * zoom
    # Coordinates of the corner of what is seen, in [-1, 1].
    θ = torch.tensor([[scale, 0.0, 0.3 * (right - 0.5)], [0.0, scale, 0.3 * (down - 0.5)]])
    grid = F.affine_grid(θ.to(images).expand(len(images), 2, 3), list(images.shape), False)
    seen = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    radius = blur * images.shape[-1] / 64
    if radius > 0.3:
        seen = smooth(seen, radius)
    rough = torch.randn(images.shape[1:], generator=generator)
    return seen + noise * rough.to(images)


def smooth(x: Tensor, σ: float) -> Tensor:
    """Gaussian low-pass of (B, C, h, w), standard deviation σ in pixels; σ = 0 changes nothing."""
    if σ <= 0:
        return x
    reach = max(1, math.ceil(2.5 * σ))
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * σ * σ))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[:, :, None, :], groups=x.shape[1])
    return F.conv2d(rows, kernel[:, :, :, None], groups=x.shape[1])


def shared(d: Tensor, h: Tensor, σ: float) -> Tensor:
    """The part of a guidance d that goes towards a concept, place by place, (B, C, h, w).

    a ⊙ h with a = max(0, ⟨d, h⟩ / ⟨h, h⟩), the inner products over channels and a Gaussian window.
    Where the picture shows the concept, the prompt's d = ep − e0 and the concept's h = e_h − e0
    pull alike, and a is near 1; elsewhere they do not, and nothing is taken away.
    Ours; Perp-Neg (arXiv 2304.04968) projects whole predictions, and keeps the other part.

    Args:
        d: Guidance of the prompt.
        h: Guidance of the concept.
        σ: Standard deviation of the window, in latent pixels.
    """
    dh, hh = (smooth((x * h).sum(1, keepdim=True), σ) for x in (d, h))
    return (dh / hh.clamp(min=1e-12)).clamp(min=0) * h


def published(g: Tensor, γ: float) -> Tensor:
    """Δx̂0 = −γ ∇log p_h (arXiv 2505.08817)."""
    return -γ * g


def normalised(g: Tensor, ρ: float, reference: Tensor) -> Tensor:
    """Δx̂0 = −ρ · r · ∇log p_h / RMS(∇log p_h), r (B,) an RMS to measure against.

    MPGD (arXiv 2311.16424) takes r = s · RMS(ep − e0), the size of the guidance, so that ρ carries
    over between models, densities and picture sizes. A gradient of zero moves nothing.
    """
    size = rms(g)
    step = torch.where(size > 0, ρ * reference / size.clamp(min=1e-38), torch.zeros_like(size))
    return -step.view(-1, 1, 1, 1) * g


def rms(x: Tensor) -> Tensor:
    """Root of the mean square of each sample, (B,)."""
    flat = x.float().flatten(1)
    # Gradients of a density that is nearly saturated have squares below what float32 holds.
    most = flat.abs().amax(1, keepdim=True).clamp(min=1e-38)
    return ((flat / most).square().mean(1, keepdim=True).sqrt() * most).squeeze(1)


def stage(schedule: str | Sequence[float], progress: float, window: tuple[float, float]) -> float:
    """γ_t / γ at a share `progress` in [0, 1) of the denoising.

    Args:
        schedule: `constant`; `window`, 1 inside the window and 0 outside; `cosine`, from 1 down to
            0; or a list of factors, spread evenly over the steps.
        progress: Share of the steps that are done.
        window: (from, to), of `window`.
    """
    if not isinstance(schedule, str):
        return schedule[min(int(progress * len(schedule)), len(schedule) - 1)]
    if schedule == "constant":
        return 1.0
    if schedule == "window":
        return float(window[0] <= progress < window[1])
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"got schedule {schedule!r}; allowed: constant, window, cosine, or a list")
