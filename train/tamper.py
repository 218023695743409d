"""Erase under the weights that fine-tuning would lead to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.conditioning import Conditioning
    from expunge.train.predictions import Networks


@dataclass(frozen=True)
class Tamper:
    """Some steps are taken under W + Δ, where Δ is what an attacker's fine-tuning has come to.

    The attacker has a few of the erased pictures and descends ‖ε − ε_{W+Δ}(x_t, t, c)‖² by Adam,
    one step for each of ours; then he begins anew with others. Our gradient is taken at W + Δ as if
    Δ were given, the first order of the problem that arXiv 2408.00761 states for language models.

    Attributes:
        every: Of so many steps one is taken under W + Δ.
        restart: Steps after which the attacker begins anew.
        learning_rate: The attacker's.
        pictures: How many he has.
        batch_size: His, at each step, on each process the same.
        layers: Module group that he moves.
    """

    every: int = 2
    restart: int = 50
    learning_rate: float = 5e-4
    pictures: int = 8
    batch_size: int = 8
    layers: Literal["x", "x-strict"] = "x"

    def __post_init__(self) -> None:
        for name in ("every", "restart", "pictures", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"got tamper.{name} {getattr(self, name)}; allowed: 1 or more")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"got tamper.learning_rate {self.learning_rate}; allowed: above 0 to 1"
            )


class Tampering:
    """Δ of every layer that is moved. The weights themselves are never touched.

    Args:
        how: Its settings.
        networks: Whose student is attacked.
        names: Of the linear layers that are moved, as the UNet calls them.
        seed: Of what the attacker draws.
    """

    def __init__(self, how: Tamper, networks: Networks, names: Sequence[str], seed: int) -> None:
        self.how, self.networks, self.seed, self.on = how, networks, seed, False
        layers = [networks.unet.get_submodule(name) for name in names]
        # Zeros of the shape of a layer's weight and bias, which may be quantised.
        self.Δ = [
            [_zeros(layer, layer.out_features, layer.in_features)]
            + ([_zeros(layer, layer.out_features)] if layer.bias is not None else [])
            for layer in layers
        ]
        for layer, Δ in zip(layers, self.Δ, strict=True):
            layer.register_forward_hook(partial(self._add, Δ))
        self._begin()

    def _begin(self) -> None:
        import torch

        weights = [part for Δ in self.Δ for part in Δ]
        for part in weights:
            part.data.zero_()
        self.adam = torch.optim.Adam(weights, lr=self.how.learning_rate)

    def _add(self, Δ: list[Tensor], _: Any, inputs: Any, output: Tensor) -> Tensor:
        """(W + Δ) x of one layer."""
        import torch

        if not self.on:
            return output
        return output + torch.nn.functional.linear(inputs[0].to(Δ[0].dtype), *Δ).to(output.dtype)

    @contextmanager
    def applied(self, on: bool = True) -> Iterator[None]:
        """Inside, the UNet's weights are W + Δ, or W.

        Gradient checkpointing runs a forward again in its backward, which has to find the same.
        """
        before, self.on = self.on, on
        try:
            yield
        finally:
            self.on = before

    def due(self, step: int) -> bool:
        """Whether a training step is taken under W + Δ."""
        return step % self.how.every == self.how.every - 1

    def advance(self, step: int, x_0: Tensor, prompts: Sequence[str], embed: Any) -> float:
        """One step of the attacker; his loss before it.

        Args:
            step: Of the training.
            x_0: The erased pictures, of which he has some.
            prompts: Theirs, in turn where they are fewer.
            embed: Prompts -> what the UNet is told.
        """
        import torch

        how = self.how
        if step % how.restart == 0:
            self._begin()
        episode = torch.Generator().manual_seed(self.seed * 1_000_003 + step // how.restart)
        few = torch.randperm(len(x_0), generator=episode)[: how.pictures]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = few[torch.randint(len(few), (how.batch_size,), generator=generator)]
        told = embed([prompts[i % len(prompts)] for i in rows.tolist()])
        weights = [part for Δ in self.Δ for part in Δ]
        with self.applied():
            loss = self.loss(x_0[rows], told, generator)
            gradients = torch.autograd.grad(loss, weights)
        for part, g in zip(weights, gradients, strict=True):
            part.grad = g if g.isfinite().all() else None  # fp16 may overflow
        self.adam.step()
        self.adam.zero_grad()
        return float(loss.detach())

    def loss(self, x_0: Tensor, told: Conditioning, generator: Any) -> Tensor:
        """‖ε − ε_{W+Δ}(x_t, t, c)‖², a scalar; call it, and its backward, where Δ is applied."""
        import torch

        from expunge import prediction
        from expunge.train.predictions import Inputs

        networks = self.networks
        unet, T = networks.unet, networks.scheduler.config.num_train_timesteps
        t = torch.randint(T, (len(x_0),), generator=generator)
        ε = torch.randn(x_0.shape, generator=generator)
        ᾱ = prediction.alpha_bar(networks.scheduler, t)
        x_t = prediction.noised(x_0, ε, ᾱ).to(unet.device)
        inputs = Inputs(x_t, t.to(unet.device), told)
        dtype = unet.conv_in.weight.dtype
        # Not through what is prepared for several processes: its gradients are no one's.
        raw = unet(x_t.to(dtype), inputs.t, **told.arguments(dtype)).sample.float()
        networks.forwards["student"] += 3 * len(x_0)
        loss: Tensor = (networks.to_epsilon(raw, inputs) - ε.to(raw)).square().mean()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        Δ = [[part.detach().cpu() for part in parts] for parts in self.Δ]
        return {"Δ": Δ, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From plain values."""
        for parts, olds in zip(self.Δ, state["Δ"], strict=True):
            for part, old in zip(parts, olds, strict=True):
                part.data.copy_(old)
        self.adam.load_state_dict(state["adam"])


def _zeros(layer: Any, *shape: int) -> Tensor:
    import torch

    return torch.zeros(*shape, device=layer.weight.device, requires_grad=True)
