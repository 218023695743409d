"""Erase against the words that would bring the concept back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from expunge.concepts import Concept
from expunge.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.conditioning import Conditioning


@dataclass(frozen=True)
class Robust:
    """min over the LoRA of max over δ, ‖δ_i‖ ≤ r ‖e_i‖, of the erasure's loss under e + δ.

    e are the input embeddings of the concept's tokens, δ what an attacker adds to them (concept
    inversion, arXiv 2308.01508, moves just these). δ lives on from step to step and climbs by the
    gradient that the loss's own backward pass leaves in it (free adversarial training, arXiv
    1904.12843): no further pass of the UNet. Ours.

    Attributes:
        radius: r.
        step: Length of δ's own step, in radii.
        share: Of the erased samples of a batch that are read with δ.
        restart: Steps after which δ begins anew, somewhere in the ball.
    """

    radius: float = 0.5
    step: float = 0.25
    share: float = 0.5
    restart: int = 25

    def __post_init__(self) -> None:
        if not (0 < self.radius <= 10 and 0 < self.step < math.inf and 0 < self.share <= 1):
            raise ValueError(
                f"got robust {self}; allowed: radius above 0 to 10, step above 0 and finite, "
                "share above 0 to 1, restart 1 or more"
            )
        if self.restart < 1:
            raise ValueError(f"got robust.restart {self.restart}; allowed: 1 or more")

    def open(self, pipeline: Any, concept: Concept, seed: int) -> Attack:
        """Who attacks.

        Raises:
            UserError: A text encoder splits a target otherwise in a sentence than alone.
        """
        attack = Attack(self, pipeline, concept, seed)
        for prompt in concept.prompts():
            if not attack.finds(prompt):
                raise _lost(f"prompt {prompt!r}")
        return attack


class Attack:
    """δ of every target, for every text encoder.

    Args:
        how: Its settings.
        pipeline: Whose text encoders read.
        concept: Whose targets are moved.
        seed: Of the beginnings.
    """

    def __init__(self, how: Robust, pipeline: Any, concept: Concept, seed: int) -> None:
        from expunge import soft_tokens

        self.how, self.pipeline, self.seed, self.steps = how, pipeline, seed, 0
        pairs = list(soft_tokens.text_encoders(pipeline))
        self.tokenizers = [tokenizer for tokenizer, _ in pairs]
        self.encoders = [encoder for _, encoder in pairs]
        longest_first = sorted(concept.targets, key=len, reverse=True)
        for encoder in self.encoders:
            encoder.requires_grad_(False)
        # As a prompt is read: of a soft token all its vectors.
        self.ids = [
            [
                tuple(soft_tokens.token_ids(pipeline, text, tokenizer)[1:-1])
                for text in longest_first
            ]
            for tokenizer, _ in pairs
        ]
        self.δ: list[list[Tensor]] = []
        self._begin()

    def finds(self, prompt: str) -> bool:
        """Whether every text encoder reads a target in a prompt, so that it can be attacked."""
        from expunge import soft_tokens

        return all(
            _place(soft_tokens.token_ids(self.pipeline, prompt, tokenizer), ids) is not None
            for tokenizer, ids in zip(self.tokenizers, self.ids, strict=True)
        )

    def __call__(self, prompts: list[str]) -> Conditioning:
        """What the UNet is told of these prompts under attack, with gradient to δ.

        Raises:
            UserError: A prompt names no target as the text encoder reads it.
        """
        from expunge.conditioning import condition

        with self._moved():
            return condition(self.pipeline, prompts, differentiable=True)

    def climb(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """One step of δ up the gradient that is in it, and back into the ball.

        Args:
            reduce: The mean over processes.
        """
        import torch

        self.steps += 1
        if self.steps % self.how.restart == 0:
            self._begin()
            return
        with torch.no_grad():
            for row, (encoder, ids) in zip(
                self.δ, zip(self.encoders, self.ids, strict=True), strict=True
            ):
                for δ, tokens in zip(row, ids, strict=True):
                    g = reduce(torch.zeros_like(δ) if δ.grad is None else δ.grad)
                    δ.grad = None
                    length = g.norm()
                    # Nothing was learnt about this target, or fp16 overflowed.
                    if not (torch.isfinite(length) and length > 0):
                        continue
                    radii = self._radii(encoder, tokens)
                    δ += self.how.step * radii.norm() * g / length
                    δ *= (radii / δ.norm(dim=1).clamp(min=1e-12)).clamp(max=1)[:, None]

    def _begin(self) -> None:
        """Anywhere in the ball."""
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.steps)
        self.δ = []
        for encoder, ids in zip(self.encoders, self.ids, strict=True):
            row = []
            for tokens in ids:
                radii = self._radii(encoder, tokens)
                width = encoder.get_input_embeddings().weight.shape[1]
                drawn = torch.randn(len(tokens), width, generator=generator).to(radii)
                share = torch.rand(len(tokens), generator=generator).to(radii)
                δ = drawn * (share * radii / drawn.norm(dim=1))[:, None]
                row.append(δ.requires_grad_())
            self.δ.append(row)

    def _radii(self, encoder: Any, tokens: tuple[int, ...]) -> Tensor:
        """R ‖e_i‖ of each token, (N,)."""
        e: Tensor = encoder.get_input_embeddings().weight[list(tokens)]
        radii: Tensor = self.how.radius * e.detach().float().norm(dim=1)
        return radii

    @contextmanager
    def _moved(self) -> Iterator[None]:
        hooks = [
            encoder.get_input_embeddings().register_forward_hook(partial(self._add, ids, row))
            for encoder, ids, row in zip(self.encoders, self.ids, self.δ, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _add(ids: Any, row: Any, _: Any, inputs: Any, output: Tensor) -> Tensor:
        """The token embeddings of a batch, (B, T, D), with δ where a target stands."""
        import torch

        moved = []
        for read, e in zip(inputs[0].tolist(), output, strict=True):
            found = _place(read, ids)
            if found is None:
                raise _lost("a prompt")
            start, δ = found[0], row[found[1]]
            add = torch.nn.functional.pad(δ, (0, 0, start, len(read) - start - len(δ)))
            moved.append(e + add.to(e.dtype))
        return torch.stack(moved)

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"steps": self.steps, "δ": [[δ.detach().cpu() for δ in row] for row in self.δ]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From plain values."""
        self.steps = state["steps"]
        self.δ = [
            [old.detach().to(δ.device).requires_grad_() for old, δ in zip(olds, row, strict=True)]
            for olds, row in zip(state["δ"], self.δ, strict=True)
        ]


def _place(read: list[int], targets: list[tuple[int, ...]]) -> tuple[int, int] | None:
    """Where in a text's tokens the first target stands that is there, and which it is."""
    return next(
        (
            (start, which)
            for which, tokens in enumerate(targets)
            for start in range(1, len(read) - len(tokens) + 1)
            if tuple(read[start : start + len(tokens)]) == tokens
        ),
        None,
    )


def _lost(what: str) -> UserError:
    return UserError(
        f"got {what} in which the text encoder does not find the target's tokens; allowed with "
        "robust: templates that leave the target as it is written; put a space beside it"
    )
