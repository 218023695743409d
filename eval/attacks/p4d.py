"""Prompting4Debugging: a prompt under which the erased model predicts what the base does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from expunge.eval.attacks import Attack

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.eval.attacks.arena import Arena


@dataclass(frozen=True)
class Prompting4Debugging(Attack):
    """min over prompts P* of ‖ε_base(x_t, t, P) − ε_θ(x_t, t, P*)‖², x_0 the base's picture of P.

    Chin et al., arXiv 2309.06135, equation 6. The free tokens are continuous vectors; each forward
    sees the nearest words by cosine in their place, and the gradient there moves the vectors
    (arXiv 2302.03668).

    Attributes:
        variant: `n`, a prompt of N free tokens alone (P4D-N), or `k`, a free token in front of
            every k tokens of the prompt and behind the last (P4D-K).
        tokens: N.
        every: K.
        iterations: Steps of AdamW.
        tried_every: Steps between two whole samplings.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
    """

    variant: Literal["n", "k"] = "n"
    tokens: int = 16
    every: int = 3
    iterations: int = 3000
    tried_every: int = 50
    learning_rate: float = 0.1
    weight_decay: float = 0.1

    access = "white box"

    def __post_init__(self) -> None:
        least = min(self.tokens, self.every, self.iterations, self.tried_every)
        if least < 1 or not self.learning_rate > 0:
            raise ValueError(
                f"got {self}; allowed: tokens, every, iterations and tried_every from 1, "
                "learning_rate above 0"
            )

    def prepare(self, arena: Arena) -> None:
        """Only models with one text encoder."""
        from expunge.eval.attacks.white_box import require_one_encoder

        require_one_encoder(arena.erased, "p4d")

    def run(self, arena: Arena, cases: Sequence[int]) -> None:
        """Optimise all prompts at once; a case that succeeds is left alone."""
        import torch

        from expunge import backbones, prediction, soft_tokens
        from expunge.eval.attacks import white_box
        from expunge.eval.attacks.arena import Trial

        victim, base = arena.erased, arena.base
        device = victim.unet.device
        vocabulary = white_box.words(victim, sexual=arena.sexual)
        E = white_box.table(victim)[vocabulary.to(device)].float()
        T = victim.scheduler.config.num_train_timesteps
        most = victim.tokenizer.model_max_length - 2
        prompts = {i: arena.cases[i].prompt for i in cases}
        draw = {i: arena.generator("p4d", prompts[i], arena.cases[i].seed) for i in cases}
        # None is the place of a free token.
        plan = {
            i: self.places(soft_tokens.token_ids(victim, text)[1:-1], most)
            for i, text in prompts.items()
        }
        e = {}
        for i in cases:
            start = torch.randint(0, len(E), (plan[i].count(None),), generator=draw[i])
            e[i] = E[start.to(device)].clone().requires_grad_()
        x_0 = dict(zip(cases, arena.targets(cases), strict=True))
        told = dict(zip(cases, backbones.encode_prompts(base, [*prompts.values()]), strict=True))
        adam = torch.optim.AdamW(e.values(), lr=self.learning_rate, weight_decay=self.weight_decay)
        left, lost = list(cases), set()
        for step in range(1, self.iterations + 1):
            ids = white_box.framed(victim, [[j or 0 for j in plan[i]] for i in left])
            where = torch.zeros_like(ids, dtype=torch.bool)
            for row, i in enumerate(left):
                where[row, [1 + p for p, j in enumerate(plan[i]) if j is None]] = True
            nearest = [nearest_words(e[i].detach(), E) for i in left]
            hard = [E[n].requires_grad_() for n in nearest]
            x, generators = torch.stack([x_0[i] for i in left]), [draw[i] for i in left]
            t = white_box.times_like(x, generators, T)
            ε = white_box.noise_like(x, generators)
            x_t = prediction.noised(x, ε, prediction.alpha_bar(victim.scheduler, t))
            with torch.no_grad():
                wanted = white_box.epsilon(base, x_t, t, torch.stack([told[i] for i in left]))
            text = white_box.states(victim, ids, where, torch.cat(hard))
            error = wanted - white_box.epsilon(victim, x_t, t, text)
            loss = error.square().flatten(1).mean(1).sum()
            gradients = torch.autograd.grad(loss, hard)
            adam.zero_grad()
            for i, g in zip(left, gradients, strict=True):
                e[i].grad = g
            adam.step()
            with torch.no_grad():
                for i in left:
                    if not e[i].isfinite().all():
                        lost.add(i)
                        e[i].zero_()  # for the others' sake, who go on in this batch
            arena.spend(left, 4)
            if step % self.tried_every and step < self.iterations:
                continue
            trials = []
            for i in left:
                chosen = vocabulary[nearest_words(e[i].detach(), E).cpu()].tolist()
                whole = [chosen.pop(0) if j is None else j for j in plan[i]]
                shown = prompts[i] if i in lost else white_box.written(victim, whole)
                trials.append(Trial(i, shown, f"step {step}", diverged=i in lost))
            left = [i for i in arena.withstood(trials) if i not in lost]
            if not left:
                return

    def places(self, ids: Sequence[int], most: int) -> list[int | None]:
        """The prompt's tokens with None where a free one stands, at most so many in all."""
        if self.variant == "n":
            return [None] * min(self.tokens, most)
        found: list[int | None] = []
        for start in range(0, len(ids), self.every):
            found += [None, *ids[start : start + self.every]]
        if len(ids) % self.every == 0:
            found.append(None)
        return found[:most]


def nearest_words(e: Tensor, E: Tensor) -> Tensor:
    """For each vector of e (N, D) the row of E (V, D) with the greatest cosine, (N,)."""
    from torch.nn import functional as F

    cosines: Tensor = F.normalize(e, dim=1) @ F.normalize(E, dim=1).T
    return cosines.argmax(1)
