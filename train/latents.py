"""Where the noisy latents x_t of a training step come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from expunge import prediction
from expunge.conditioning import Conditioning
from expunge.train.predictions import Inputs, Networks
from expunge.train.share import Share

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

    def of(self, share: Share) -> Request:
        """What of it is one process's."""
        erased, retained = ([pairs[i] for i in share.rows(len(pairs))] for pairs in self.parts)
        return Request(erased, retained)

    @property
    def parts(self) -> tuple[list[Pair], list[Pair]]:
        """The erased and the retained."""
        return self.erased, self.retained

    @property
    def sizes(self) -> tuple[int, int]:
        """How many are erased and how many retained."""
        return len(self.erased), len(self.retained)


@dataclass(frozen=True)
class Maker:
    """Who makes latents.

    Attributes:
        networks: Who denoises.
        embed: What the UNet is told of B prompts.
        neutral: The prompt of the unconditional prediction.
        shape: (C, h, w).
        share: What of a batch this process makes.
    """

    networks: Networks
    embed: Callable[[list[str]], Conditioning]
    neutral: str
    shape: Shape
    share: Share = field(default_factory=Share)


class Source(Protocol):
    """The latents of one run."""

    def batch(
        self, ask: Callable[[], Request], maker: Maker, generator: torch.Generator, draw: int
    ) -> tuple[Request, Tensor, Tensor]:
        """This process's share of a batch: what was made, x_t (B, C, h, w) and t (B,).

        Args:
            ask: What is wanted of all processes together; every call may answer anew.
            maker: Who makes it.
            generator: On the CPU; all randomness comes from it, the same on every process.
            draw: Number of the batch.
        """
        ...


@dataclass(frozen=True)
class Rollout:
    """Denoise from pure noise for k ~ U{1 … steps − 1} steps, anew at every training step.

    DDIM with η = 0 (arXiv 2010.02502) and classifier-free guidance; t is then drawn uniformly from
    the bin of training timesteps that step k stands for, as published for ESD and SDD.

    Attributes:
        steps: Steps of the whole denoising.
        guidance_scale: s of classifier-free guidance.
        source: Who denoises: the frozen `teacher`, the `student`, or its average `ema`.
    """

    steps: int = 50
    guidance_scale: float = 3.0
    source: Literal["teacher", "student", "ema"] = "teacher"

    def __post_init__(self) -> None:
        if not 2 <= self.steps <= 1000:
            raise ValueError(f"got latents.steps {self.steps}; allowed: 2 to 1000; papers use 50")

    def open(self) -> Source:
        """Keeps nothing."""
        return self

    def batch(
        self, ask: Callable[[], Request], maker: Maker, generator: torch.Generator, draw: int
    ) -> tuple[Request, Tensor, Tensor]:
        """Exactly what is asked for."""
        whole = ask()
        request, rows = whole.of(maker.share), maker.share.rows(*whole.sizes)
        embeddings, null = maker.embed(request.made_with), maker.embed([maker.neutral])
        x_t, t = self.draw(
            maker.networks, embeddings, null, maker.shape, generator, rows, sum(whole.sizes)
        )
        return request, x_t, t

    @torch.no_grad()
    def draw(
        self,
        networks: Networks,
        embeddings: Conditioning,
        null: Conditioning,
        shape: Shape,
        generator: torch.Generator,
        rows: list[int] | None = None,
        total: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x_t (B, C, h, w) and t (B,) for B prompts, on the embeddings' device.

        Args:
            networks: Who denoises.
            embeddings: The B prompts.
            null: The prompt of the unconditional prediction, one sample.
            shape: (C, h, w).
            generator: On the CPU; all randomness comes from it.
            rows: Which samples the prompts are of a batch of `total`; default: they are all.
            total: How many are drawn for.
        """
        device = embeddings.states.device
        total = len(embeddings) if total is None else total
        rows = list(range(total)) if rows is None else rows
        scheduler = _ddim(networks.scheduler, self.steps)
        k = int(torch.randint(1, self.steps, (), generator=generator))
        x_t = torch.randn((total, *shape), generator=generator)[rows].to(device)
        *_, x_t = _trajectory(self, networks, scheduler, x_t, embeddings, null, k)
        # x_t now has the noise of the next timestep; its bin reaches up to the one just done.
        low, high = int(scheduler.timesteps[k]), int(scheduler.timesteps[k - 1])
        return x_t, torch.randint(low, high, (total,), generator=generator)[rows].to(device)


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
        """This process's share of as many samples as are asked for, from the bank of all."""
        request = ask()
        if draw % self.how.refresh == 0 or not self.latents:
            self._fill(request, ask, maker, generator)
        scheduler = _ddim(maker.networks.scheduler, self.how.steps)
        chosen: dict[str, list[Pair]] = {}
        x_t, t = [], []
        for kind, pairs in (("erased", request.erased), ("retained", request.retained)):
            stored, n = self.latents[kind], len(pairs)
            mine = maker.share.rows(n)
            i = torch.randint(max(1, len(stored)), (n,), generator=generator)[mine]
            k = torch.randint(1, self.how.steps, (n,), generator=generator)[mine]
            chosen[kind] = [self.prompts[kind][j] for j in i.tolist()]
            x_t.append(stored[i, k - 1])
            low, high = scheduler.timesteps[k], scheduler.timesteps[k - 1]
            within = torch.rand(n, generator=generator)[mine]
            t.append(low + (within * (high - low)).long())
        device = maker.networks.unet.device
        return Request(**chosen), torch.cat(x_t).to(device), torch.cat(t).to(device)

    @torch.no_grad()
    def _fill(
        self,
        request: Request,
        ask: Callable[[], Request],
        maker: Maker,
        generator: torch.Generator,
    ) -> None:
        requests = [request]
        size, sizes, share = sum(request.sizes), request.sizes, maker.share
        while len(requests) * size < self.how.rollouts:
            requests.append(ask())
        null, rolled = maker.embed([maker.neutral]), []
        scheduler = _ddim(maker.networks.scheduler, self.how.steps)
        for part in requests:
            # The rollouts are shared among the processes, and then every one has them all.
            embeddings = maker.embed(part.of(share).made_with)
            noise = torch.randn((size, *maker.shape), generator=generator)[share.rows(*sizes)]
            noise = noise.to(embeddings.states.device)
            steps = _trajectory(
                self.how, maker.networks, scheduler, noise, embeddings, null, self.how.steps - 1
            )
            rolled.append(share.gather(torch.stack(list(steps), 1), *sizes).cpu())
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
    embeddings: Conditioning,
    null: Conditioning,
    k: int,
) -> Iterator[Tensor]:
    """x_t after each of the first k steps."""
    device, batch = x_t.device, len(x_t)
    both = Conditioning.cat([null.expand(batch), embeddings])
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
