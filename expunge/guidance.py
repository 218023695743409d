"""−γ · 1[p_h ≥ η] · ∇log p_h: the one place that says how x̂0 is moved away from harm.

Or, in the prediction, against the text of what is seen: `against_text`. The published scheme (arXiv
2505.08817) takes γ as it is; `normalised` strength follows MPGD (arXiv 2311.16424). A raw CLIP
gradient is adversarial: it lowers CLIP's own score and leaves the object in the picture. What is
done about it is in `views` and `smooth`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.densities.base import HarmDensity

LEAST, FULL = 0.1, 0.4  # of a map's maximum: below the one nothing is there, above the other all
SPREAD = 0.56  # of a window, in distances between places: neighbours overlap, corners are reached

Decode = Callable[[Tensor], Tensor]


def against_text(
    prompt: Tensor, texts: Tensor, M: Tensor, M_h: Tensor, w: float, s: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The parts of −s (max_h M_h ⊙ (ep − e0) + w Σ_h M_h ⊙ (e_h − e0)): the first, and each h's.

    The sum is the caller's, who knows which concept belongs to which sample.

    Args:
        prompt: ep − e0, (B, C, h, w).
        texts: e_h − e0 of what is seen, (…, C, h, w).
        M: Where each concept was ever seen, (B, H, h, w). However many concepts, there is one
            prompt: of its guidance no more is taken away than there is.
        M_h: Where what is seen is, (…, h, w), of each text.
        w: How strongly its text is guided away from.
        s: Guidance scale; 1: in the prediction under the prompt.
    """
    return -s * M.amax(1, keepdim=True) * prompt, -w * s * M_h.unsqueeze(-3) * texts


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


@torch.no_grad()
def whereabouts(images: Tensor, density: HarmDensity, concept: Tensor, n: int) -> Tensor:
    """Where a picture shows a concept, (B, 1, H, W) in [0, 1]: what p_h loses when it is covered.

    Each of n × n places is covered in turn by the picture's mean colour, through a Gaussian window
    b_k; M = Σ_k b_k max(0, p_h(x) − p_h(x (1 − b_k) + x̄ b_k)) / Σ_k b_k, stretched from `LEAST` to
    `FULL` of its maximum. After occlusion maps (arXiv 1311.2901). A gradient does not tell that:
    what stands beside the concept lowers a cosine too, and so has a gradient as large.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        density: p_h.
        concept: Which one is looked for in each picture, (B,).
        n: Places along a side.
    """
    H, W = images.shape[2:]
    b = _windows(n, H, W, images)
    mean = images.mean((2, 3), keepdim=True)
    M = []
    for x, mean_x, c in zip(images, mean, concept.tolist(), strict=True):
        covered = x * (1 - b) + mean_x * b
        p = density(torch.cat([x[None], covered])).per_concept[:, c]
        loss = (p[0] - p[1:]).clamp(min=0).view(-1, 1, 1, 1)
        M.append((loss * b).sum(0) / b.sum(0))
    found = torch.stack(M)
    most = found.amax((1, 2, 3), keepdim=True)
    stretched = ((found / most.clamp(min=1e-12) - LEAST) / (FULL - LEAST)).clamp(0, 1)
    # Nothing alone makes it out: then it is everywhere.
    return torch.where(most > 0, stretched, torch.ones_like(stretched))


def _windows(n: int, H: int, W: int, like: Tensor) -> Tensor:
    """b_k, (n², 1, H, W), of standard deviation 0.56 / n of a side."""

    def along(size: int) -> Tensor:
        centre = (torch.arange(n, device=like.device) + 0.5) / n
        at = (torch.arange(size, device=like.device) + 0.5) / size
        return torch.exp(-0.5 * ((at - centre[:, None]) * n / SPREAD) ** 2)

    return (along(H)[:, None, :, None] * along(W)[None, :, None, :]).reshape(n * n, 1, H, W)


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
