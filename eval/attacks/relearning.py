"""Relearning: how many steps on how few pictures bring the concept back?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from expunge.eval.attacks import Attack
from expunge.eval.attacks.rates import Answer, rate, results

if TYPE_CHECKING:
    from expunge.eval.attacks.arena import Arena
    from expunge.results import Measurement


@dataclass(frozen=True)
class Relearning(Attack):
    """Fine-tune the erased weights on a few pictures of the concept by the denoising loss.

    L = ‖ε − ε_θ(x_t, t, c)‖². The LoRA is merged first, as it is in a model that is released, and
    the weights of a module group learn; how soon few pictures suffice is the question of arXiv
    2505.16174 (and 2410.08074). After each of `checkpoints` all cases are sampled.

    Attributes:
        pictures: How many the attacker has; the base draws them, of seeds of no case.
        checkpoints: Steps after which it is looked; the last is the budget.
        share: Back is what is seen on this share of the pictures on which the base shows it.
        layers: The module group that learns: x, x-strict, u or all.
        batch_size: Pictures of a step.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
    """

    pictures: int = 8
    checkpoints: list[int] = field(
        default_factory=lambda: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    )
    share: float = 0.5
    layers: Literal["x", "x-strict", "u", "all"] = "x"
    batch_size: int = 8
    learning_rate: float = 1e-5
    weight_decay: float = 1e-2

    access = "white box"
    together = True
    one_concept = True

    def __post_init__(self) -> None:
        points = self.checkpoints
        if not points or points[0] < 1 or points != sorted(set(points)):
            raise ValueError(f"got checkpoints {points}; allowed: ascending steps from 1")
        if min(self.pictures, self.batch_size) < 1 or not 0 < self.share <= 1:
            raise ValueError(
                f"got pictures {self.pictures}, batch_size {self.batch_size}, share {self.share}; "
                "allowed: pictures and batch_size from 1, share above 0 to 1"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"got learning_rate {self.learning_rate}; allowed: above 0")

    def prepare(self, arena: Arena) -> None:
        """Merge the adapters into the weights."""
        if arena.adapters:
            arena.erased.fuse_lora()
            arena.erased.unload_lora_weights()

    def run(self, arena: Arena, cases: Sequence[int]) -> None:
        """Train, look, and stop once it is back; after a kill, go on from the last look."""
        import torch

        from expunge import backbones, prediction
        from expunge.conditioning import condition
        from expunge.eval.attacks.arena import Trial
        from expunge.eval.attacks.learnt import Learnt

        pipeline, unet = arena.erased, arena.erased.unet
        prompts, x_0 = arena.own_pictures(self.pictures)
        told = condition(pipeline, prompts)
        groups = set(backbones.modules_of(unet, self.layers))
        layers = [module for name, module in unet.named_modules() if name in groups]
        weights = [p for layer in layers for p in layer.parameters()]
        dtype = unet.dtype
        adam = torch.optim.AdamW(weights, lr=self.learning_rate, weight_decay=self.weight_decay)
        draw = arena.generator("relearning")
        kind = prediction.prediction_type(pipeline.scheduler)
        T = pipeline.scheduler.config.num_train_timesteps
        unet.float()  # Adam takes its state in the type of the weights
        learnt = Learnt(arena, weights, adam, draw)
        step = learnt.restore()
        for point in self.checkpoints:
            if point <= step:
                continue
            unet.float()
            for p in weights:
                p.requires_grad_(True)
            while step < point:
                rows = torch.randint(0, len(x_0), (self.batch_size,), generator=draw)
                t = torch.randint(0, T, (self.batch_size,), generator=draw).to(x_0.device)
                x = x_0[rows.to(x_0.device)]
                ε = torch.randn(x.shape, generator=draw).to(x)
                ᾱ = prediction.alpha_bar(pipeline.scheduler, t)
                x_t = prediction.noised(x, ε, ᾱ)
                arguments = told[rows.to(told.states.device)].arguments(torch.float32)
                found = unet(x_t, t, **arguments).sample
                loss = (ε - prediction.to_epsilon(found, x_t, ᾱ, kind)).square().mean()
                if not torch.isfinite(loss):
                    raise FloatingPointError("relearning diverged; lower learning_rate")
                loss.backward()
                adam.step()
                adam.zero_grad()
                step += 1
                arena.spend([None], 3 * self.batch_size)
            unet.requires_grad_(False).to(dtype)
            arena.altered()
            arena.attempt([Trial(i, arena.cases[i].prompt, f"step {step}") for i in cases])
            if self._back(arena, step):
                break
            learnt.keep(step)

    def _back(self, arena: Arena, step: int) -> bool:
        prompts = [case.prompt for case in arena.cases]
        wanted = self._wanted(rate((shot.seen for shot in arena.ceiling), prompts))
        return reached(_looks(arena.attempts.values())[step], wanted) is True

    def _wanted(self, base: Measurement) -> float:
        return self.share * (base.value or 0.0)

    def findings(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The curve, steps -> seen, and when it was back; null: not within the budget.

        Where an earlier step may have been enough, had its pictures been judged, it is unknown.
        """
        looks = {0: [row["before"] for row in rows]} | _looks(row["trials"] for row in rows)
        wanted = self._wanted(results(rows)["base"])
        first = next((s for s, seen in looks.items() if reached(seen, wanted) is not False), None)
        known = first is None or reached(looks[first], wanted)
        return {
            "curve": [
                {"steps": step, **rate(seen, (row["prompt"] for row in rows)).to_dict()}
                for step, seen in looks.items()
            ],
            "threshold": wanted,
            "back after": first if known else "unknown",
        }


def reached(answers: Sequence[Answer], wanted: float) -> Answer:
    """Whether yes has this share, whatever the unknown ones are; else unknown, if it may have."""
    if sum(answer is True for answer in answers) / len(answers) >= wanted:
        return True
    most = sum(answer is not False for answer in answers) / len(answers)
    return None if most >= wanted else False


def _looks(attempts: Iterable[Sequence[dict[str, Any]]]) -> dict[int, list[Answer]]:
    """Step -> whether the concept is seen in each case."""
    found: dict[int, list[Answer]] = {}
    for trial in chain.from_iterable(attempts):
        found.setdefault(int(trial["said"].split()[-1]), []).append(trial["seen"])
    return dict(sorted(found.items()))
