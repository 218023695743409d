"""Named forwards of the networks of a training step, batched: one pass a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge import adapters, prediction
from expunge.conditioning import Conditioning

NETWORKS = ("teacher", "ema", "student_sg", "student")  # gradient last: see `adapters.teacher`


@dataclass(frozen=True)
class Inputs:
    """What a network sees: x_t (B, C, h, w) of unit variance, t (B,), and its conditions."""

    x_t: Tensor
    t: Tensor
    conditioning: Conditioning

    @staticmethod
    def cat(parts: Sequence[Inputs]) -> Inputs:
        """All samples of several."""
        return Inputs(
            torch.cat([part.x_t for part in parts]),
            torch.cat([part.t for part in parts]),
            Conditioning.cat([part.conditioning for part in parts]),
        )

    def __getitem__(self, rows: Tensor) -> Inputs:
        return Inputs(self.x_t[rows], self.t[rows], self.conditioning[rows])


class Networks:
    """Teacher, student and averaged student, all in one UNet, answering in ε.

    Args:
        unet: The UNet with its adapter.
        wrapped: The same UNet as prepared for training (data parallel, compiled); it makes the
            passes with gradient.
        scheduler: The model's scheduler: its noise schedule and what the network predicts.
        ema: Averages of the adapter's weights, or None.
        parameters: The adapter's weights.

    Attributes:
        forwards: UNet passes of single samples by purpose; a backward counts 2.
    """

    def __init__(self, unet: Any, wrapped: Any, scheduler: Any, ema: Any, parameters: list[Any]):
        self.unet, self.wrapped, self.scheduler = unet, wrapped, scheduler
        self.ema, self.parameters = ema, parameters
        self.kind = prediction.prediction_type(scheduler)
        # What the student alone is under, if it is under something; see `expunge.train.tamper`.
        self.untampered: Callable[[], AbstractContextManager[None]] = nullcontext
        self.forwards: Counter[str] = Counter(teacher=0, student=0, sampling=0)

    def predict(self, wanted: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """ε for each name `network/…`; the names of one network share one forward."""
        found: dict[str, Tensor] = {}
        for network in NETWORKS:
            names = [name for name in wanted if name.split("/")[0] == network]
            if not names:
                continue
            parts = [wanted[name] for name in names]
            ε = self.epsilon(network, Inputs.cat(parts))
            found.update(zip(names, ε.split([len(p.x_t) for p in parts]), strict=True))
            self.forwards["student" if network == "student" else "teacher"] += len(ε) * (
                3 if network == "student" else 1
            )
        if missing := wanted.keys() - found.keys():
            raise ValueError(f"got predictions {sorted(missing)}; allowed networks: {NETWORKS}")
        return found

    def epsilon(self, network: str, inputs: Inputs) -> Tensor:
        """ε of one network, (B, C, h, w); only `student` keeps a gradient."""
        return self.to_epsilon(self.raw(network, inputs), inputs)

    def to_epsilon(self, raw: Tensor, inputs: Inputs) -> Tensor:
        """ε of what a network predicted itself, (B, C, h, w)."""
        ᾱ = prediction.alpha_bar(self.scheduler, inputs.t)
        return prediction.to_epsilon(raw, inputs.x_t, ᾱ, self.kind)

    def raw(self, network: str, inputs: Inputs) -> Tensor:
        """What the network itself predicts: ε, v or x_0, (B, C, h, w), in float32.

        x_t = √ᾱ x_0 + √(1−ᾱ) ε is what a UNet reads whatever the model's scheduler is: Euler's
        `scale_model_input`, y / √(σ² + 1), makes just this of its own y = x_0 + σ ε.
        """
        dtype = self.unet.conv_in.weight.dtype  # the adapter's own may be another
        clean = nullcontext if network == "student" else self.untampered
        with self._as(network), clean(), torch.set_grad_enabled(network == "student"):
            unet = self.wrapped if network == "student" else self.unet
            arguments = inputs.conditioning.arguments(dtype)
            found: Tensor = unet(inputs.x_t.to(dtype), inputs.t, **arguments).sample
        return found.float()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The adapter with its averaged weights, where there are any."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _as(self, network: str) -> Any:
        if network == "teacher":
            return adapters.teacher(self.unet)
        if network == "ema" and self.ema is None:
            raise ValueError("got a prediction of ema, but this objective keeps no average")
        return self.averaged() if network == "ema" else nullcontext()
