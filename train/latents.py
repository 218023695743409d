"""Where the noisy latents x_t of a training step come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from expunge import prediction
from expunge.conditioning import Conditioning
from expunge.train.coreset import changes, choose, gram
from expunge.train.memory import Batch, Memory, Pair, Request
from expunge.train.predictions import Inputs, Networks
from expunge.train.share import Share

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Maker:
    """Who makes latents.

    Attributes:
        networks: Who denoises.
        embed: What the UNet is told of B prompts.
        neutral: The prompt of the unconditional prediction.
        shape: (C, h, w).
        vae: The model's autoencoder, for who makes latents of pictures.
        twins: Whether the objective asks for the twins of pictures.
        share: What of a batch this process makes.
    """

    networks: Networks
    embed: Callable[[list[str]], Conditioning]
    neutral: str
    shape: Shape
    vae: Any = None
    twins: bool = False
    share: Share = field(default_factory=Share)


class Source(Protocol):
    """The latents of one run."""

    def batch(
        self, ask: Callable[[], Request], maker: Maker, generator: torch.Generator, draw: int
    ) -> Batch:
        """This process's share of what was made.

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
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"got latents.guidance_scale {self.guidance_scale}; allowed: 0 or more and finite; "
                "papers use 3"
            )
        if not all(0 < shape <= 100 for shape in self.beta):
            raise ValueError(f"got latents.beta {self.beta}; allowed: above 0, to 100")

    def likelihood(self, τ: Tensor) -> Tensor:
        """How likely t = τ T is to be drawn, up to a factor, (n,)."""
        if self.times == "uniform":
            return torch.ones_like(τ)
        a, b = self.beta
        τ = τ.clamp(1e-3, 1 - 1e-3)
        # In logarithms, since a and b may be large.
        found: Tensor = (a - 1) * τ.log() + (b - 1) * (1 - τ).log()
        return (found - found.max()).exp() if len(found) else found

    def draw_k(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw k, (n,) of 1 … steps − 1: after how many steps x_t is taken, as `times` says."""
        if self.times == "uniform":
            return torch.randint(1, self.steps, (n,), generator=generator)
        # The middle of the bin of step k, as a share of T.
        τ = 1 - (torch.arange(1, self.steps, dtype=torch.float64) + 0.5) / self.steps
        weights = self.likelihood(τ)
        return 1 + torch.multinomial(weights, n, replacement=True, generator=generator)

    def open(self) -> Source:
        """Keeps nothing."""
        return self

    def batch(
        self, ask: Callable[[], Request], maker: Maker, generator: torch.Generator, draw: int
    ) -> Batch:
        """Exactly what is asked for."""
        whole = ask()
        request, rows = whole.of(maker.share), maker.share.rows(*whole.sizes)
        embeddings, null = maker.embed(request.made_with), maker.embed([maker.neutral])
        x_t, t = self.draw(
            maker.networks, embeddings, null, maker.shape, generator, rows, sum(whole.sizes)
        )
        return Batch(request, x_t, t)

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
        scheduler = ddim(networks.scheduler, self.steps)
        k = int(self.draw_k(1, generator))
        x_t = torch.randn((total, *shape), generator=generator)[rows].to(device)
        for state in trajectory(self, networks, scheduler, x_t, embeddings, null, k):
            x_t = state.after
        # x_t now has the noise of the next timestep; its bin reaches up to the one just done.
        low, high = int(scheduler.timesteps[k]), int(scheduler.timesteps[k - 1])
        return x_t, torch.randint(low, high, (total,), generator=generator)[rows].to(device)


@dataclass(frozen=True)
class Replay(Rollout):
    """Denoise now and then, all the way, and learn from every x_t on the way, many times.

    A rollout costs 2 · steps passes of the UNet and gives `steps` latents: drawn from a bank, an
    x_t costs a fraction of a pass instead of about `steps` of them, and what the frozen teacher
    says of it is asked once, or never, where the teacher itself denoised. Batches mix prompts and
    noise levels, each x_t with the t it was met at; the grids of timesteps are shifted from one
    rollout to the next, so that together they cover all t. Ours.

    Attributes:
        rollouts: Denoisings in the bank, in the proportion of erased and retained samples.
        refresh: Batches from one bank to the next, made by the `source` as it is then.
        coreset: How many of the retained latents are learned from, those that together stand best
            for all in the bank; 0: all.
        directions: Of the LoRA in which they are to stand for all. Costs so many passes, and one,
            for each retained latent.
    """

    rollouts: int = 64
    refresh: int = 50
    coreset: int = 0
    directions: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.rollouts, self.refresh, self.directions) < 1 or self.coreset < 0:
            raise ValueError(
                f"got {self}; allowed: rollouts, refresh and directions 1 or more, coreset 0 or "
                "more"
            )
        if self.coreset and self.times != "uniform":
            raise ValueError(
                f"got latents.times {self.times} with a coreset, which weighs latents itself; "
                "allowed: times uniform, or coreset 0"
            )

    def open(self) -> Bank:
        """Empty."""
        return Bank(self)


class Bank:
    """Every x_t of the last denoisings; it belongs to a checkpoint.

    Args:
        how: Its settings.

    Attributes:
        latents: Of `erased` and of `retained` samples, (N · steps, C, h, w), on the CPU.
        timesteps: Theirs, (N · steps,).
        prompts: Whose they are, N pairs each.
        memory: What frozen networks said of them.
        weights: How often each is drawn, (N · steps,).
    """

    def __init__(self, how: Replay) -> None:
        self.how = how
        self.weights: dict[str, Tensor] = {}
        self.latents: dict[str, Tensor] = {}
        self.timesteps: dict[str, Tensor] = {}
        self.prompts: dict[str, list[Pair]] = {}
        self.memory: dict[str, Memory] = {}

    def batch(
        self, ask: Callable[[], Request], maker: Maker, generator: torch.Generator, draw: int
    ) -> Batch:
        """This process's share of as many samples as are asked for, from the bank of all."""
        request = ask()
        if draw % self.how.refresh == 0 or not self.latents:
            self._fill(request, ask, maker, generator)
        chosen: dict[str, list[Pair]] = {}
        places: dict[str, Tensor] = {}
        for kind, pairs in (("erased", request.erased), ("retained", request.retained)):
            weights, n = self.weights[kind], len(pairs)
            drawn = torch.zeros(0, dtype=torch.long)
            if n:
                drawn = torch.multinomial(weights, n, replacement=True, generator=generator)
            places[kind] = drawn[maker.share.rows(n)]
            chosen[kind] = [self.prompts[kind][i // self.how.steps] for i in places[kind].tolist()]
        x_t, t = (
            torch.cat([of[kind][places[kind]] for kind in ("erased", "retained")])
            for of in (self.latents, self.timesteps)
        )
        device = maker.networks.unet.device
        return Batch(Request(**chosen), x_t.to(device), t.to(device), self.memory, places)

    @torch.no_grad()
    def _fill(
        self,
        request: Request,
        ask: Callable[[], Request],
        maker: Maker,
        generator: torch.Generator,
    ) -> None:
        how, requests, share = self.how, [request], maker.share
        total = maker.networks.scheduler.config.num_train_timesteps
        size, (n, _) = len(request.made_with), request.sizes
        while len(requests) * size < how.rollouts:
            requests.append(ask())
        null, rolled = maker.embed([maker.neutral]), []
        for part in requests:
            scheduler = ddim(maker.networks.scheduler, how.steps)
            scheduler.timesteps += _shift(scheduler, generator)
            # The rollouts are shared among the processes, and then every one has them all.
            embeddings = maker.embed(part.of(share).made_with)
            noise = torch.randn((size, *maker.shape), generator=generator)
            noise = noise[share.rows(*part.sizes)].to(embeddings.states.device)
            steps = trajectory(how, maker.networks, scheduler, noise, embeddings, null, how.steps)
            rolled.append([share.gather(x, *part.sizes).cpu() for x in _stack(list(steps))])
        pairs = {
            "erased": [pair for part in requests for pair in part.erased],
            "retained": [pair for part in requests for pair in part.retained],
        }
        for kind, rows in (("erased", slice(None, n)), ("retained", slice(n, None))):
            x_t, t, e0, e = (torch.cat([part[i][rows] for part in rolled]) for i in range(4))
            self.prompts[kind] = pairs[kind]
            self.latents[kind], self.timesteps[kind] = x_t.flatten(0, 1), t.flatten()
            self.memory[kind] = Memory(len(self.timesteps[kind]))
            self.weights[kind] = how.likelihood(self.timesteps[kind] / total)
            if how.source == "teacher" and len(t):
                self._overheard(kind, e0.flatten(0, 1), e.flatten(0, 1))
        if how.coreset and pairs["retained"]:
            self.weights["retained"] = self._stand_for_all(maker, generator)

    def _stand_for_all(self, maker: Maker, generator: torch.Generator) -> Tensor:
        """Weights of the retained latents, few of them above 0."""
        read = [made for made, _ in self.prompts["retained"] for _ in range(self.how.steps)]
        device = maker.networks.unet.device
        x_t, t = (x["retained"].to(device) for x in (self.latents, self.timesteps))
        inputs = Inputs(x_t, t, maker.embed(read))
        changed = changes(maker.networks, inputs, self.how.directions, generator)
        weights = choose(gram(changed), self.how.coreset)
        return maker.share.first(weights.to(device)).cpu()

    def _overheard(self, kind: str, e0: Tensor, e: Tensor) -> None:
        """The teacher has said it while it denoised."""
        memory, everywhere = self.memory[kind], torch.arange(len(e0))
        # Where the loss asks for another prompt than x_t was made with, it has not.
        alike = torch.tensor([made == asked for made, asked in self.prompts[kind]])
        same = alike.repeat_interleave(self.how.steps).nonzero().squeeze(1)
        if kind == "retained":
            memory.keep("teacher/retained", same, e[same])
        else:
            memory.keep("teacher/null", everywhere, e0)
            memory.keep("teacher/concept", same, e[same])

    def state_dict(self) -> dict[str, Any]:
        """The bank as plain values."""
        memory = {kind: memory.state_dict() for kind, memory in self.memory.items()}
        return {
            "latents": self.latents,
            "timesteps": self.timesteps,
            "prompts": self.prompts,
            "memory": memory,
            "weights": self.weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From plain values."""
        self.latents, self.timesteps = state["latents"], state["timesteps"]
        self.weights = state["weights"]
        self.prompts = {kind: [tuple(p) for p in pairs] for kind, pairs in state["prompts"].items()}
        self.memory = {kind: Memory.of(memory) for kind, memory in state["memory"].items()}


@dataclass(frozen=True)
class _State:
    """A step of a denoising: x_t before it, what was predicted there, x_t after it."""

    before: Tensor
    t: Tensor
    e0: Tensor
    e: Tensor
    after: Tensor


def _stack(states: list[_State]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t (B, K, C, h, w), t (B, K), predictions without and with the prompt."""
    x_t, t, e0, e = (
        torch.stack([getattr(state, name) for state in states], 1)
        for name in ("before", "t", "e0", "e")
    )
    return x_t, t, e0, e


def trajectory(
    how: Any,
    networks: Networks,
    scheduler: Any,
    x_t: Tensor,
    embeddings: Conditioning,
    null: Conditioning,
    k: int,
    source: str = "",
) -> Iterator[_State]:
    """The first k steps of DDIM with guidance; `how` says its scale, and else its source."""
    source = source or how.source
    device, batch = x_t.device, len(x_t)
    both = Conditioning.cat([null.expand(batch), embeddings])
    network = "teacher" if source == "teacher" else "student_sg"
    # Once for all steps: every change of weights goes by way of the CPU.
    with networks.averaged() if source == "ema" else nullcontext():
        for t in scheduler.timesteps[:k]:
            inputs = Inputs(torch.cat([x_t, x_t]), t.expand(2 * batch).to(device), both)
            raw = networks.raw(network, inputs)
            networks.forwards["sampling"] += 2 * batch
            # Guidance is linear, so it may act on ε, v or x_0 alike.
            raw0, raw_p = raw.chunk(2)
            guided = prediction.guide(raw0, raw_p, how.guidance_scale)
            after = scheduler.step(guided, t, x_t).prev_sample
            e0, e = networks.to_epsilon(raw, inputs).chunk(2)
            yield _State(x_t, inputs.t[:batch], e0, e, after)
            x_t = after


def ddim(scheduler: Any, steps: int) -> Any:
    """A DDIM scheduler of that many steps with the noise schedule of another."""
    from diffusers import DDIMScheduler

    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    ddim.set_timesteps(steps)
    return ddim


def _shift(scheduler: Any, generator: torch.Generator) -> int:
    """How far a grid of timesteps is moved, at most to its neighbours' places."""
    lowest, highest = int(scheduler.timesteps[-1]), int(scheduler.timesteps[0])
    last = scheduler.config.num_train_timesteps - 1
    return int(torch.randint(-lowest, last - highest + 1, (), generator=generator))
