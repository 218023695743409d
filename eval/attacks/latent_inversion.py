"""Latent inversion: does a starting noise still lead to the concept?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from expunge.eval.attacks import Attack

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.conditioning import Conditioning
    from expunge.eval.attacks.arena import Arena


@dataclass(frozen=True)
class LatentInversion(Attack):
    """x_T of the base's picture by DDIM inversion on the erased model, sampled again from there.

    x_{t'} = √ᾱ_{t'} x̂0 + √(1−ᾱ_{t'}) ε_θ(x_{t'}, t', c), solved for x_{t'} by repetition
    (arXiv 2010.02502, equation 12 run backwards; the question is arXiv 2412.00782's). It is
    inverted without guidance and sampled with the suite's: with none, both would undo each other in
    any model, and the picture would come back whatever the model knows.

    Attributes:
        told: What the model is told while it inverts: the case's prompt, or none; each is tried.
        steps: DDIM steps of the inversion; null: as many as the suite samples with.
        repetitions: Predictions at each step; the first is made at the x of the step before.
        typical: Each noise is scaled to ‖x_T‖² = d, where noise that is drawn lies (d = 1,024: 1 ±
            0.09 d in 95 of 100). By a flow there is a noise for every picture, also for one that
            the model would never draw; what tells them apart is how likely it is (arXiv
            2412.00782).
    """

    told: list[Literal["prompt", "null"]] = field(default_factory=lambda: ["prompt", "null"])
    steps: int | None = None
    repetitions: int = 3
    typical: bool = False

    access = "white box"

    def __post_init__(self) -> None:
        if not self.told or self.repetitions < 1 or (self.steps or 1) < 1:
            raise ValueError(
                f"got {self}; allowed: told with prompt, null or both, steps and repetitions from 1"
            )

    def run(self, arena: Arena, cases: Sequence[int]) -> None:
        """Invert and sample all cases at once, once for each of `told`."""
        from expunge.conditioning import condition
        from expunge.eval.attacks.arena import Trial

        x_0 = dict(zip(cases, arena.targets(cases), strict=True))
        left = list(cases)
        n = self.steps or arena.steps
        for told in self.told:
            import torch

            prompts = [arena.cases[i].prompt for i in left]
            texts = condition(arena.erased, prompts if told == "prompt" else [""] * len(left))
            x = torch.stack([x_0[i] for i in left])
            noise = invert(arena.erased, x, texts, n, self.repetitions)
            arena.spend(left, n * self.repetitions)
            said = [f"noise by {told}, ‖x_T‖²/d = {float(z.square().mean()):.2f}" for z in noise]
            if self.typical:
                noise = on_shell(noise)
            diverged = (~noise.isfinite()).flatten(1).any(1).tolist()
            trials = [
                Trial(*trial) for trial in zip(left, prompts, said, noise, diverged, strict=True)
            ]
            left = arena.withstood(trials)
            if not left:
                return


def on_shell(x: Tensor) -> Tensor:
    """Each sample as x √d / ‖x‖, (B, C, h, w)."""
    size: Tensor = x.square().flatten(1).mean(1).sqrt()
    return x / size.view(-1, 1, 1, 1)


def invert(pipeline: Any, x_0: Tensor, told: Conditioning, steps: int, repetitions: int) -> Tensor:
    """x_T (B, C, h, w), of unit variance, from which DDIM leads to x_0 without guidance.

    Where it diverges it is NaN or infinite; more steps or fewer repetitions may help.
    """
    import torch

    from expunge import prediction

    scheduler, unet = pipeline.scheduler, pipeline.unet
    kind = prediction.prediction_type(scheduler)
    scheduler.set_timesteps(steps)
    ascending = [int(t) for t in scheduler.timesteps.flip(0)]
    arguments = told.arguments(unet.dtype)
    x = x_0
    ᾱ_from = torch.full((len(x),), float(scheduler.alphas_cumprod[0]), device=x.device)
    with torch.no_grad():
        for t in ascending:
            at = torch.full((len(x),), t, device=x.device)
            ᾱ = prediction.alpha_bar(scheduler, at)
            before = x
            for _ in range(repetitions):
                found = unet(x.to(unet.dtype), at, **arguments).sample.float()
                ε = prediction.to_epsilon(found, x, ᾱ, kind)
                x = prediction.noised(prediction.to_x0(ε, before, ᾱ_from), ε, ᾱ)
            ᾱ_from = ᾱ
    return x
