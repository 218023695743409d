"""SAFREE: prompts without the subspace of the concept (arXiv 2410.12761), its text side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expunge.concepts import Concept
from expunge.errors import UserError
from expunge.sampling.samplers.base import Sampler

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.sampling.denoiser_hook import Guidance


@dataclass(frozen=True)
class Safree(Sampler):
    """Words that bring a prompt near the concept lose the concept's directions, in the first steps.

    e_i ← (I − P_C) P_I e_i for trigger tokens i; see `expunge.sampling.safree`.

    Attributes:
        alpha: α, by how much more than the others a token must matter.
        up_to: u, the most steps that get the filtered prompt.
        offset: t, ten times the change of the prompt at which half of them do.
        sharpness: k.
    """

    alpha: float = 0.01
    up_to: int = 10
    offset: float = 5.333
    sharpness: float = 2.5

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.up_to < 0 or self.sharpness < 0:
            raise ValueError(f"got {self}; allowed: alpha, up_to and sharpness 0 or more")

    def wrap(self, pipeline: Any, concept: Concept | None) -> Any:
        """The pipeline with filtered prompts; every prompt of the concept spans its subspace."""
        import torch

        from expunge.sampling.denoiser_hook import Guidance, guide_denoiser
        from expunge.sampling.safree import filter_of, filtered_steps, project

        phrases = self.require(concept).prompts()

        def start(pipeline: Any, arguments: Mapping[str, Any]) -> Guidance:
            prompts = _prompts(arguments)
            found = {p: filter_of(pipeline, p, phrases, self.alpha) for p in dict.fromkeys(prompts)}

            def embeddings(step: int, states: Tensor) -> Tensor:
                if step >= self.up_to:
                    return states
                null, before = states.chunk(2)
                if before.shape[1] != len(found[prompts[0]].triggers):
                    raise UserError(
                        f"got prompts of {before.shape[1]} token embeddings; allowed: "
                        f"{len(found[prompts[0]].triggers)}, as the tokenizer makes them"
                    )
                # Pipelines repeat each prompt for all of its pictures before the next one.
                copies = len(before) // len(prompts)
                filters = [found[p] for p in prompts for _ in range(copies)]
                after = project(before, filters)
                on = [
                    step
                    < filtered_steps(
                        e, changed, f.triggers.to(e.device), self.up_to, self.offset, self.sharpness
                    )
                    for e, changed, f in zip(before, after, filters, strict=True)
                ]
                now = torch.tensor(on, device=states.device)[:, None, None]
                return torch.cat([null, torch.where(now, after, before)])

            return Guidance(embeddings=embeddings)

        return guide_denoiser(pipeline, start)


def _prompts(arguments: Mapping[str, Any]) -> list[str]:
    prompt = arguments.get("prompt")
    for name in ("prompt_embeds", "prompt_2", "clip_skip"):
        if arguments.get(name) is not None:
            raise UserError(f"got {name}; allowed with SAFREE: one prompt, in words; leave it out")
    if prompt is None:
        raise UserError("got no prompt; allowed with SAFREE: a prompt in words, or a list of them")
    return [prompt] if isinstance(prompt, str) else list(prompt)
