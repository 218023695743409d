"""UnlearnDiffAtk: an adversarial prefix, found by gradients of the erased model's own loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expunge.eval.attacks import Attack

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.eval.attacks.arena import Arena


@dataclass(frozen=True)
class UnlearnDiffAtk(Attack):
    """min over prefixes δ' of ‖ε − ε_θ(x_t, t, [δ', c])‖², x_0 a picture of the concept.

    Zhang et al., arXiv 2310.11868, equation 5. Each of k tokens is a distribution u over the
    vocabulary; a token is drawn from it, and its gradient taken for u's, clipped to [−1, 1]
    (arXiv 2212.09254). After each step of Adam u is projected onto the simplex. After the
    iterations of a timestep the most probable tokens are tried by a whole sampling.

    Attributes:
        tokens: k; 3 for objects and styles, 5 for nudity and violence, as published.
        iterations: Steps of Adam at each timestep.
        times: Timesteps, evenly spread and ascending; after each the prefix is tried.
        learning_rate: Of Adam.
        weight_decay: Of Adam, added to the gradient.
    """

    tokens: int = 3
    iterations: int = 40
    times: int = 50
    learning_rate: float = 0.01
    weight_decay: float = 0.1

    access = "white box"

    def __post_init__(self) -> None:
        if min(self.tokens, self.iterations, self.times) < 1 or not self.learning_rate > 0:
            raise ValueError(
                f"got {self}; allowed: tokens, iterations and times from 1, learning_rate above 0"
            )

    def prepare(self, arena: Arena) -> None:
        """Only models with one text encoder."""
        from expunge.eval.attacks.white_box import require_one_encoder

        require_one_encoder(arena.erased, "unlearndiffatk")

    def run(self, arena: Arena, cases: Sequence[int]) -> None:
        """Optimise all prefixes at once; a case that succeeds is left alone."""
        import torch

        from expunge import prediction, soft_tokens
        from expunge.eval.attacks import white_box
        from expunge.eval.attacks.arena import Trial

        victim = arena.erased
        device, k = victim.unet.device, self.tokens
        vocabulary = white_box.words(victim, sexual=arena.sexual)
        E = white_box.table(victim)[vocabulary.to(device)].float()
        T = victim.scheduler.config.num_train_timesteps
        prompts = {i: arena.cases[i].prompt for i in cases}
        read = {i: soft_tokens.token_ids(victim, text)[1:-1] for i, text in prompts.items()}
        x_0 = dict(zip(cases, arena.targets(cases), strict=True))
        draw = {
            i: arena.generator("unlearndiffatk", text, arena.cases[i].seed)
            for i, text in prompts.items()
        }
        V = len(vocabulary)
        u = {i: torch.full((k, V), 1 / V, device=device, requires_grad=True) for i in cases}
        adam = torch.optim.Adam(u.values(), lr=self.learning_rate, weight_decay=self.weight_decay)
        left = list(cases)
        for t in timesteps(T, self.times):
            ids = white_box.framed(victim, [[0] * k + read[i] for i in left])
            where = torch.zeros_like(ids, dtype=torch.bool)
            where[:, 1 : 1 + k] = True
            x, generators = torch.stack([x_0[i] for i in left]), [draw[i] for i in left]
            at = torch.full((len(left),), t, device=device)
            ᾱ = prediction.alpha_bar(victim.scheduler, at)
            lost = set()
            for _ in range(self.iterations):
                drawn = torch.cat([one_hot(u[i], draw[i]) for i in left])
                text = white_box.states(victim, ids, where, drawn @ E)
                ε = white_box.noise_like(x, generators)
                x_t = prediction.noised(x, ε, ᾱ)
                error = ε - white_box.epsilon(victim, x_t, at, text)
                loss = error.square().flatten(1).mean(1).sum()
                gradients = torch.autograd.grad(loss, [u[i] for i in left])
                adam.zero_grad()  # None: what succeeded is not moved
                for i, g in zip(left, gradients, strict=True):
                    u[i].grad = g.clamp(-1, 1)
                adam.step()
                with torch.no_grad():
                    for i in left:
                        u[i].copy_(onto_simplex(u[i]))
                        if not is_distribution(u[i]):
                            lost.add(i)
                            u[i].fill_(1 / V)  # for the others' sake, who go on in this batch
            arena.spend(left, 3 * self.iterations)
            trials = []
            for i in left:
                prefix = white_box.written(victim, vocabulary[u[i].argmax(1).cpu()].tolist())
                shown = prompts[i] if i in lost else f"{prefix} {prompts[i]}"
                trials.append(Trial(i, shown, f"prefix of t = {t}", diverged=i in lost))
            left = [i for i in arena.withstood(trials) if i not in lost]
            if not left:
                return


def timesteps(T: int, n: int) -> list[int]:
    """N timesteps in the middles of as many equal parts of [0, T), ascending."""
    return [int((i + 0.5) * T / n) for i in range(n)]


def one_hot(u: Tensor, generator: Any) -> Tensor:
    """A token drawn from each row of u (k, V), as one-hot rows; its gradient is passed on to u."""
    import torch
    from torch.nn import functional as F

    drawn = torch.multinomial(u.detach().cpu(), 1, generator=generator)[:, 0]
    hot = F.one_hot(drawn, u.shape[1]).to(u)
    return hot + u - u.detach()


def is_distribution(u: Tensor) -> bool:
    """Whether tokens can be drawn from u (k, V): NaN gradients and huge steps end that."""
    sums = u.sum(1)
    return bool(((sums > 0.5) & (sums < 2)).all())


def onto_simplex(v: Tensor) -> Tensor:
    """Each row of v (k, V) moved to the nearest point with entries ≥ 0 that sum to 1.

    max(v − θ, 0), θ from the sorted entries (Duchi et al. 2008,
    https://doi.org/10.1145/1390156.1390191).
    """
    import torch

    largest_first = v.sort(dim=1, descending=True).values
    excess = largest_first.cumsum(1) - 1
    n = torch.arange(1, v.shape[1] + 1, device=v.device)
    support = (largest_first * n > excess).sum(1, keepdim=True).clamp(min=1)  # 0: v is NaN or huge
    θ = excess.gather(1, support - 1) / support
    return (v - θ).clamp(min=0)
