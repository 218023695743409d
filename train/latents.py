"""Where the noisy latents x_t of a training step come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from expunge import prediction
from expunge.train.predictions import Inputs, Networks

Shape = tuple[int, int, int]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Request:
    """Whose x_t a training step asks for.

    Attributes:
        erased: (prompt that makes x_t, concept prompt of the loss).
        retained: (prompt that makes x_t and that the student reads, prompt the teacher reads).
    """

    erased: list[Pair]
    retained: list[Pair]

    @property
    def made_with(self) -> list[str]:
        """The prompts that make x_t, the erased first."""
        return [made for made, _ in [*self.erased, *self.retained]]


@dataclass(frozen=True)
class Maker:
    """Who makes latents.

    Attributes:
        networks: Who denoises.
        embed: Prompts to embeddings (B, T, D).
        neutral: The prompt of the unconditional prediction.
        shape: (C, h, w).
    """

    networks: Networks
    embed: Callable[[list[str]], Tensor]
    neutral: str
    shape: Shape


class Source(Protocol):
    """The latents of one run."""

    def batch(
        self, ask: Callable[[], Request], maker: Maker, generator: torch.Generator, draw: int
    ) -> tuple[Request, Tensor, Tensor]:
        """What was made, x_t (B, C, h, w) and t (B,).

        Args:
            ask: What is wanted; every call may answer anew.
            maker: Who makes it.
            generator: On the CPU; all randomness comes from it.
            draw: Number of the batch.
        """
        ...


@dataclass(frozen=True)
class Rollout:
    """Denoise from pure noise for k ~ U{1 … steps − 1} steps, anew at every training step.

    DDIM with η = 0 (arXiv 2010.02502) and classifier-free guidance; t is then drawn uniformly from
    the bin of training timesteps that step k stands for, as published for ESD and SDD. `times`
    draws k otherwise.

    Attributes:
        steps: Steps of the whole denoising.
        guidance_scale: s of classifier-free guidance.
        source: Who denoises: the frozen `teacher`, the `student`, or its average `ema`.
        times: How t is drawn, from 0 (clean) to T (noise): `uniform`, or t / T ~ Beta(a, b).
        beta: a and b; (3, 3), of HFI (arXiv 2407.21032), prefers the middle.
    """

    steps: int = 50
    guidance_scale: float = 3.0
    source: Literal["teacher", "student", "ema"] = "teacher"
    times: Literal["uniform", "beta"] = "uniform"
    beta: tuple[float, float] = (3.0, 3.0)

    def __post_init__(self) -> None:
        if not 2 <= self.steps <= 1000:
            raise ValueError(f"got latents.steps {self.steps}; allowed: 2 to 1000; papers use 50")
        if not all(0 < shape <= 100 for shape in self.beta):
            raise ValueError(f"got latents.beta {self.beta}; allowed: above 0, to 100")

    def draw_k(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw k, (n,) of 1 … steps − 1: after how many steps x_t is taken, as `times` says."""
        if self.times == "uniform":
            return torch.randint(1, self.steps, (n,), generator=generator)
        # The middle of the bin of step k, as a share of T.
        τ = 1 - (torch.arange(1, self.steps, dtype=torch.float64) + 0.5) / self.steps
        a, b = self.beta
        weights = τ ** (a - 1) * (1 - τ) ** (b - 1)
        share = torch.rand(n, dtype=torch.float64, generator=generator) * weights.sum()
        return 1 + torch.searchsorted(weights.cumsum(0), share).clamp(max=self.steps - 2)

    def open(self) -> Source:
        """Keeps nothing."""
        return self

    def batch(
        self, ask: Callable[[], Request], maker: Maker, generator: torch.Generator, draw: int
    ) -> tuple[Request, Tensor, Tensor]:
        """Exactly what is asked for."""
        request = ask()
        embeddings, null = maker.embed(request.made_with), maker.embed([maker.neutral])
        x_t, t = self.draw(maker.networks, embeddings, null, maker.shape, generator)
        return request, x_t, t

    @torch.no_grad()
    def draw(
        self,
        networks: Networks,
        embeddings: Tensor,
        null: Tensor,
        shape: Shape,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """x_t (B, C, h, w) and t (B,) for B prompts, on the embeddings' device.

        Args:
            networks: Who denoises.
            embeddings: The prompts, (B, T, D).
            null: The prompt of the unconditional prediction, (1, T, D).
            shape: (C, h, w).
            generator: On the CPU; all randomness comes from it.
        """
        batch, device = len(embeddings), embeddings.device
        scheduler = _ddim(networks.scheduler, self.steps)
        k = int(self.draw_k(1, generator))
        x_t = torch.randn((batch, *shape), generator=generator).to(device, embeddings.dtype)
        *_, x_t = _trajectory(self, networks, scheduler, x_t, embeddings, null, k)
        # x_t now has the noise of the next timestep; its bin reaches up to the one just done.
        low, high = int(scheduler.timesteps[k]), int(scheduler.timesteps[k - 1])
        return x_t, torch.randint(low, high, (batch,), generator=generator).to(device)


@dataclass(frozen=True)
class Replay(Rollout):
    """Denoise now and then, all the way, and learn from every x_t on the way, many times.

    A rollout costs 2 · steps passes of the UNet, and gives steps − 1 latents: drawn from a bank, an
    x_t costs a fraction of a pass instead of about `steps` of them. Batches mix prompts and noise
    levels. The bank is made anew every `refresh` batches, from the student as it is then. Ours.

    Attributes:
        rollouts: Denoisings in the bank, in the proportion of erased and retained samples.
        refresh: Batches from one bank to the next.
    """

    rollouts: int = 64
    refresh: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollouts < 1 or self.refresh < 1:
            raise ValueError(f"got {self}; allowed: rollouts and refresh 1 or more")

    def open(self) -> Bank:
        """Empty."""
        return Bank(self)


class Bank:
    """Every x_t of the last denoisings; it belongs to a checkpoint.

    Args:
        how: Its settings.

    Attributes:
        latents: Of `erased` and of `retained` samples, (N, steps − 1, C, h, w), on the CPU.
        prompts: Whose they are, N pairs each.
    """

    def __init__(self, how: Replay) -> None:
        self.how = how
        self.latents: dict[str, Tensor] = {}
        self.prompts: dict[str, list[Pair]] = {}

    def batch(
        self, ask: Callable[[], Request], maker: Maker, generator: torch.Generator, draw: int
    ) -> tuple[Request, Tensor, Tensor]:
        """As many samples as are asked for, from the bank."""
        request = ask()
        if draw % self.how.refresh == 0 or not self.latents:
            self._fill(request, ask, maker, generator)
        scheduler = _ddim(maker.networks.scheduler, self.how.steps)
        chosen: dict[str, list[Pair]] = {}
        x_t, t = [], []
        for kind, pairs in (("erased", request.erased), ("retained", request.retained)):
            stored, n = self.latents[kind], len(pairs)
            i = torch.randint(max(1, len(stored)), (n,), generator=generator)
            k = self.how.draw_k(n, generator)
            chosen[kind] = [self.prompts[kind][j] for j in i.tolist()]
            x_t.append(stored[i, k - 1])
            low, high = scheduler.timesteps[k], scheduler.timesteps[k - 1]
            share = torch.rand(n, generator=generator)
            t.append(low + (share * (high - low)).long())
        embeddings = maker.embed([maker.neutral])
        x = torch.cat(x_t).to(embeddings)
        return Request(**chosen), x, torch.cat(t).to(x.device)

    @torch.no_grad()
    def _fill(
        self,
        request: Request,
        ask: Callable[[], Request],
        maker: Maker,
        generator: torch.Generator,
    ) -> None:
        requests = [request]
        size = len(request.made_with)
        while len(requests) * size < self.how.rollouts:
            requests.append(ask())
        null, rolled = maker.embed([maker.neutral]), []
        scheduler = _ddim(maker.networks.scheduler, self.how.steps)
        for part in requests:
            embeddings = maker.embed(part.made_with)
            noise = torch.randn((size, *maker.shape), generator=generator).to(embeddings)
            steps = _trajectory(
                self.how, maker.networks, scheduler, noise, embeddings, null, self.how.steps - 1
            )
            rolled.append(torch.stack(list(steps), 1).cpu())
        n = len(request.erased)
        self.latents = {
            "erased": torch.cat([x[:n] for x in rolled]),
            "retained": torch.cat([x[n:] for x in rolled]),
        }
        self.prompts = {
            "erased": [pair for part in requests for pair in part.erased],
            "retained": [pair for part in requests for pair in part.retained],
        }

    def state_dict(self) -> dict[str, Any]:
        """The bank as plain values."""
        return {"latents": self.latents, "prompts": self.prompts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From plain values."""
        self.latents = state["latents"]
        self.prompts = {kind: [tuple(p) for p in pairs] for kind, pairs in state["prompts"].items()}


def _trajectory(
    how: Rollout,
    networks: Networks,
    scheduler: Any,
    x_t: Tensor,
    embeddings: Tensor,
    null: Tensor,
    k: int,
) -> Iterator[Tensor]:
    """x_t after each of the first k steps."""
    device, batch = x_t.device, len(x_t)
    both = torch.cat([null.expand_as(embeddings), embeddings])
    network = "student_sg" if how.source == "student" else how.source
    for t in scheduler.timesteps[:k]:
        inputs = Inputs(torch.cat([x_t, x_t]), t.expand(2 * batch).to(device), both)
        # Guidance is linear, so it may act on ε, v or x_0 alike.
        null_raw, prompt_raw = networks.raw(network, inputs).chunk(2)
        networks.forwards["sampling"] += 2 * batch
        raw = prediction.guide(null_raw, prompt_raw, how.guidance_scale)
        x_t = scheduler.step(raw, t, x_t).prev_sample
        yield x_t


def _ddim(scheduler: Any, steps: int) -> Any:
    from diffusers import DDIMScheduler

    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    ddim.set_timesteps(steps)
    return ddim
