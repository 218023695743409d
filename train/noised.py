"""Latents that are pictures with noise on them, as when a model is trained from pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge import prediction
from expunge.encoding import to_latents
from expunge.pictures import picture_files, read_picture
from expunge.train.latents import Maker, ddim, trajectory
from expunge.train.memory import Batch, Pair, Request


@dataclass(frozen=True)
class Noised:
    """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε of pictures x_0, with t ~ U{0 … T−1} and ε known.

    The frozen model draws the pictures once, at the start, by DDIM with guidance; from then on an
    x_t costs no pass of the UNet. For an objective that asks for them, the student as it is at the
    start draws the erased ones' twins from the same noise.

    Attributes:
        count: Pictures that are drawn, in the proportion of erased and retained samples.
        steps: Of a whole denoising.
        guidance_scale: s of classifier-free guidance.
        folder: Pictures to erase with, taken instead of drawn ones; those of retained prompts are
            always drawn. Empty: those of `concept.images`, where x_t is to show the concept.
        unprompted: Share of the samples that are read without their prompt, as classifier-free
            guidance is trained (arXiv 2207.12598); their pictures are drawn with it.
    """

    count: int = 200
    steps: int = 50
    guidance_scale: float = 3.0
    folder: str = ""
    unprompted: float = 0.0

    source: ClassVar[str] = "teacher"
    knows_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.count < 1 or not 1 <= self.steps <= 1000:
            raise ValueError(f"got {self}; allowed: count 1 or more, steps 1 to 1000")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"got latents.guidance_scale {self.guidance_scale}; allowed: 0 or more and finite"
            )
        if not 0 <= self.unprompted <= 1:
            raise ValueError(f"got unprompted {self.unprompted}; allowed: 0 to 1")

    def open(self) -> Pictures:
        """None drawn yet.

        Raises:
            UserError: The folder is missing, empty, or holds a picture that cannot be read.
        """
        files = picture_files(self.folder) if self.folder else []
        for file in files:
            read_picture(file)  # a broken one is found before anything is written
        return Pictures(self, files)


class Pictures:
    """The x_0 of one run; they belong to a checkpoint.

    Args:
        how: Its settings.
        files: Of the folder.

    Attributes:
        latents: x_0 of `erased` and of `retained` samples, and of the `twins` of the erased where
            they were drawn, (N, C, h, w), on the CPU.
        prompts: Whose they are, N pairs each; a folder's pictures are anybody's.
    """

    def __init__(self, how: Noised, files: list[Path]) -> None:
        self.how, self.files = how, files
        self.latents: dict[str, Tensor] = {}
        self.prompts: dict[str, list[Pair]] = {}

    def batch(
        self, ask: Callable[[], Request], maker: Maker, generator: torch.Generator, draw: int
    ) -> Batch:
        """This process's share of as many samples as are asked for, noised anew."""
        request = ask()
        if not self.latents:
            self._draw(request, ask, maker, generator)
        chosen: dict[str, list[Pair]] = {}
        which: dict[str, Tensor] = {}
        for kind, pairs in (("erased", request.erased), ("retained", request.retained)):
            own, n = self.prompts[kind], max(1, len(self.latents[kind]))
            i = which[kind] = torch.randint(n, (len(pairs),), generator=generator)
            chosen[kind] = [own[j] for j in i.tolist()] if own else list(pairs)
        x0 = torch.cat([self.latents[kind][i] for kind, i in which.items()])
        scheduler, device = maker.networks.scheduler, maker.networks.unet.device
        mine = maker.share.rows(*request.sizes)
        ε = torch.randn(x0.shape, generator=generator)[mine]
        t = torch.randint(scheduler.config.num_train_timesteps, (len(x0),), generator=generator)
        t = t[mine]
        ᾱ = prediction.alpha_bar(scheduler, t)
        x_t = prediction.noised(x0[mine], ε, ᾱ)
        if self.how.unprompted:
            self._silence(chosen, maker.neutral, generator)
        batch = Batch(Request(**chosen).of(maker.share), x_t.to(device), t.to(device))
        n = len(batch.request.erased)
        batch.keep("noise/made", torch.arange(n), ε[:n])
        if maker.twins:
            twins = self.latents["twins"][which["erased"]][maker.share.rows(len(request.erased))]
            ε_twin = prediction.to_epsilon(twins, x_t[:n], ᾱ[:n], "sample")
            batch.keep("twin/made", torch.arange(n), ε_twin)
        return batch

    def _silence(
        self, chosen: dict[str, list[Pair]], neutral: str, generator: torch.Generator
    ) -> None:
        """Leave prompts out: what the student reads of the erased, what both read of the rest."""
        for kind, pairs in chosen.items():
            silent = torch.rand(len(pairs), generator=generator) < self.how.unprompted
            for j in silent.nonzero().flatten().tolist():
                pairs[j] = (pairs[j][0] if kind == "erased" else neutral, neutral)

    @torch.no_grad()
    def _draw(
        self,
        request: Request,
        ask: Callable[[], Request],
        maker: Maker,
        generator: torch.Generator,
    ) -> None:
        requests = [request]
        while sum(len(part.made_with) for part in requests) < self.how.count:
            requests.append(ask())
        if self.files:
            requests = [replace(part, erased=[]) for part in requests]
        drawn, twins = [], []
        for part in requests:
            if not part.made_with:
                continue
            noise = torch.randn((sum(part.sizes), *maker.shape), generator=generator)
            drawn.append((len(part.erased), self._denoised(part, noise, maker, "teacher")))
            if maker.twins:
                n, alone = len(part.erased), replace(part, retained=[])
                twins.append(self._denoised(alone, noise[:n], maker, "student"))
        nothing = torch.zeros(0, *maker.shape)
        self.latents = {
            "erased": torch.cat([nothing, *(x[:n] for n, x in drawn)]),
            "retained": torch.cat([nothing, *(x[n:] for n, x in drawn)]),
            "twins": torch.cat([nothing, *twins]),
        }
        self.prompts = {
            "erased": [pair for part in requests for pair in part.erased],
            "retained": [pair for part in requests for pair in part.retained],
        }
        if self.files:
            pictures = map(read_picture, self.files)
            with _lent(maker):
                self.latents["erased"] = to_latents(maker.vae, maker.shape, pictures)

    def _denoised(self, part: Request, noise: Tensor, maker: Maker, source: str) -> Tensor:
        """Whole pictures, shared among the processes; then every one has them all."""
        embeddings = maker.embed(part.of(maker.share).made_with)
        null = maker.embed([maker.neutral])
        x = noise[maker.share.rows(*part.sizes)].to(maker.networks.unet.device)
        scheduler = ddim(maker.networks.scheduler, self.how.steps)
        for state in trajectory(
            self.how, maker.networks, scheduler, x, embeddings, null, self.how.steps, source
        ):
            x = state.after
        return maker.share.gather(x, *part.sizes).cpu()

    def state_dict(self) -> dict[str, Any]:
        """The pictures as plain values."""
        return {"latents": self.latents, "prompts": self.prompts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From plain values."""
        self.latents = state["latents"]
        self.prompts = {kind: [tuple(p) for p in pairs] for kind, pairs in state["prompts"].items()}


def _lent(maker: Maker) -> AbstractContextManager[Any]:
    """The autoencoder on the accelerator; offloaded, it rests on the CPU beside the encoders."""
    lender = getattr(maker.embed, "encoders", None)
    return nullcontext() if lender is None else lender.lent()
