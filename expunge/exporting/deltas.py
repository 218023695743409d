"""What a LoRA adds to each layer, ΔW = (alpha / rank) B A: read, sum, cut, put in place."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge import adapters
from expunge.errors import UserError
from expunge.low_rank import nearest


@dataclass(frozen=True)
class Delta:
    """ΔW = (alpha / rank) B A of one layer.

    Attributes:
        B: (O, rank), or (O, rank, 1, 1) of a convolution.
        A: (rank, I), or (rank, I, k, k).
        alpha: The scale is alpha / rank.
    """

    B: Tensor
    A: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.A)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """P (O, rank) and Q (rank, I·k·k) with ΔW = P Q; a convolution's is flattened."""
        return self.B.flatten(1) * (self.alpha / self.rank), self.A.flatten(1)

    @property
    def weight(self) -> Tensor:
        """ΔW in the shape of the layer's weight."""
        P, Q = self.factors
        return (P @ Q).reshape(len(P), *self.A.shape[1:])


Layers = dict[str, Delta]  # by the name of the layer in the UNet


def read(pipeline: Any, adapter: str) -> Layers:
    """The ΔW of an adapter that is loaded, at the strength that it is loaded with, in float32.

    Raises:
        UserError: It changes more than the UNet, or is not a plain LoRA.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    others = [
        part
        for part, network in pipeline.components.items()
        if part != "unet" and adapter in getattr(network, "peft_config", {})
    ]
    if others:
        raise UserError(
            f"got a LoRA that changes {', '.join(others)} too; allowed: one of the UNet alone; "
            "train the UNet only, as expunge does"
        )
    extra = [k for k in adapters.weights(pipeline.unet, adapter) if not _is_plain(k)]
    if extra:
        raise UserError(
            f"got a LoRA with {extra[0]}; allowed: plain LoRA (lora_A, lora_B), no DoRA, no biases"
        )
    layers = {}
    for name, layer in pipeline.unet.named_modules():
        if isinstance(layer, BaseTunerLayer) and adapter in layer.lora_A:
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            scaling = layer.scaling[adapter]
            alpha = _alpha(layer.lora_alpha[adapter], len(A), scaling)
            layers[name] = Delta(B.detach().float().cpu(), A.detach().float().cpu(), alpha)
    return layers


def _is_plain(key: str) -> bool:
    return key.endswith((".lora_A.weight", ".lora_B.weight"))


def _alpha(alpha: float, rank: int, scaling: float) -> float:
    """The alpha of a scaling: as it was given where that is it, to the last bit."""
    return float(alpha) if alpha / rank == scaling else scaling * rank


def total(loras: list[Layers]) -> Layers:
    """Σ ΔW exactly, as one LoRA: ranks add up, [s₁B₁ s₂B₂ …] [A₁; A₂; …], alpha = rank."""
    if len(loras) == 1:
        return loras[0]
    names = dict.fromkeys(name for layers in loras for name in layers)
    return {name: _concatenate([part[name] for part in loras if name in part]) for name in names}


def _concatenate(parts: list[Delta]) -> Delta:
    B = torch.cat([part.B * (part.alpha / part.rank) for part in parts], 1)
    return Delta(B, torch.cat([part.A for part in parts]), float(B.shape[1]))


def cut(layers: Layers, rank: int) -> tuple[Layers, float]:
    """The nearest ΔW of a rank in every layer, and ‖what is lost‖ / ‖ΔW‖ over all of them."""
    shorter, lost, norm = {}, 0.0, 0.0
    for name, delta in layers.items():
        P, Q = delta.factors
        B, A, share = nearest(P, Q, rank)
        shorter[name] = Delta(
            B.float().reshape(len(B), rank, *delta.B.shape[2:]),
            A.float().reshape(rank, *delta.A.shape[1:]),
            float(rank),
        )
        square = product(delta, delta)
        lost, norm = lost + share**2 * square, norm + square
    return shorter, math.sqrt(lost / norm)


def uniform(layers: Layers) -> Layers:
    """The same ΔW with one rank and one alpha in all layers, as every reader understands it.

    Lower ranks are filled up with zeros. diffusers' reader of Kohya files mistakes the layer's name
    where alphas differ.
    """
    if len({(delta.rank, delta.alpha) for delta in layers.values()}) == 1:
        return layers
    rank = max(delta.rank for delta in layers.values())
    return {name: _filled(_concatenate([delta]), rank) for name, delta in layers.items()}


def _filled(delta: Delta, rank: int) -> Delta:
    B, A, missing = delta.B, delta.A, rank - delta.rank
    B = torch.cat([B, B.new_zeros(len(B), missing, *B.shape[2:])], 1)
    A = torch.cat([A, A.new_zeros(missing, *A.shape[1:])])
    return Delta(B, A, float(rank))


def product(x: Delta, y: Delta) -> float:
    """⟨ΔX, ΔY⟩ = Σ (PₓᵀP_y) ∘ (QₓQ_yᵀ), of matrices as small as the ranks."""
    (P, Q), (R, S) = x.factors, y.factors
    return float(((P.double().T @ R.double()) * (Q.double() @ S.double().T)).sum())


@torch.no_grad()
def put_in_place(unet: Any, layers: Layers) -> None:
    """Switch the adapters off and add ΔW to the weights in memory."""
    unet.disable_adapters()
    for name, delta in layers.items():
        weight = unet.get_submodule(name).base_layer.weight
        weight += delta.weight.to(weight)
