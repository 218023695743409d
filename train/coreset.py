"""The few latents whose predictions stand for the model's behaviour on all.

A LoRA that changes by Δ changes the prediction at z by J(z) Δ. What preservation holds on to is
the mean of ‖J(z) Δ‖² over everything harmless; a coreset is a few z with weights that give the
same mean, for every Δ of a subspace. Functions are matched, not weights or pictures, as in
function-space pseudocoresets (arXiv 2310.17852).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from expunge.train.predictions import Inputs, Networks

SIZE = 0.02  # of a random direction, in standard deviations of a LoRA's A
BATCH = 64


def gram(D: Tensor) -> Tensor:
    """⟨d_k, d_l⟩ of the K changes of each latent, (N, K (K + 1) / 2), off the diagonal twice.

    Args:
        D: (N, K, C, h, w).
    """
    flat = D.float().flatten(2)
    G = flat @ flat.mT / flat.shape[2]
    k, m = torch.triu_indices(*G.shape[1:])
    # A quadratic form has both ⟨d_k, d_l⟩ and ⟨d_l, d_k⟩: so weighted, distances are Frobenius'.
    return G[:, k, m] * torch.where(k == m, 1.0, 2.0**0.5)


def choose(g: Tensor, size: int) -> Tensor:
    """Weights w ≥ 0, (N,), at most `size` of them above 0, with Σ w_i g_i near the mean of all g.

    Greedily: what points most along the rest that is missing comes in, and all weights are solved
    anew. They sum to one, for which a column of ones is matched as well. Where no g is above 0 any
    choice is as good, and all weights are equal.
    """
    g = g.double()
    g = torch.cat([g, g.norm(dim=1).mean().expand(len(g), 1)], 1)
    target, chosen = g.mean(0), torch.zeros(len(g), dtype=torch.bool)
    length = g.norm(dim=1).clamp(min=1e-300)
    w = torch.zeros(len(g), dtype=torch.float64)
    for _ in range(min(size, len(g))):
        gain = g @ (target - w @ g) / length
        gain[chosen] = -torch.inf
        best = int(gain.argmax())
        if gain[best] <= 0:
            break
        chosen[best] = True
        w[chosen] = non_negative(g[chosen].T, target)
    if not w.any():
        return torch.full((len(g),), 1 / len(g))
    return (w / w.sum()).float()


def non_negative(A: Tensor, b: Tensor, steps: int = 500) -> Tensor:
    """W = argmin_{w ≥ 0} ‖A w − b‖², (n,), by accelerated projected gradients."""
    AtA, Atb = A.T @ A, A.T @ b
    step = 1 / torch.linalg.matrix_norm(AtA, 2).clamp(min=1e-300)
    w = v = torch.zeros(A.shape[1], dtype=A.dtype)
    for i in range(steps):
        new = (v - step * (AtA @ v - Atb)).clamp(min=0)
        v = new + i / (i + 3) * (new - w)
        w = new
    return w


@torch.no_grad()
def changes(
    networks: Networks, inputs: Inputs, directions: int, generator: torch.Generator
) -> Tensor:
    """How the student's predictions change along random directions of its LoRA, (N, K, C, h, w).

    Costs N (K + 1) passes of the UNet, counted as sampling.
    """

    def all_of() -> Tensor:
        n = len(inputs.t)
        networks.forwards["sampling"] += n
        rows = torch.arange(n, device=inputs.t.device).split(BATCH)
        return torch.cat([networks.epsilon("student_sg", inputs[part]).cpu() for part in rows])

    before, found = all_of(), []
    for _ in range(directions):
        with _moved(networks, generator):
            found.append(all_of() - before)
    return torch.stack(found, 1)


@contextmanager
def _moved(networks: Networks, generator: torch.Generator) -> Iterator[None]:
    """Another B in every layer: at its start ΔW = B A changes with B alone."""
    layers = [p for name, p in networks.unet.named_parameters() if "lora_B" in name]
    kept = [p.detach().clone() for p in layers]
    for p in layers:
        p += SIZE * torch.randn(p.shape, generator=generator).to(p)
    try:
        yield
    finally:
        for p, old in zip(layers, kept, strict=True):
            p.copy_(old)
