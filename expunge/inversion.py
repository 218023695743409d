"""Textual inversion: pictures into a soft token that the frozen model draws them with.

    L(v) = E_{x ~ r} ‖ε − ε_θ(x_t, t, v)‖²
         + β E_{x ~ 1 − r} [ ‖ε − ε_θ(x_t, t, ∅)‖² − ‖ε − ε_θ(x_t, t, v)‖² ]₊
         + λ mean_k ((‖v_k‖ − μ) / σ)²

The first term is textual inversion (arXiv 2208.01618) of pictures in proportion to their reward r,
as human feedback inversion (arXiv 2407.21032) has it. The second, ours, keeps v from explaining
the others better than no prompt does. The third keeps v among the words: μ and σ are mean and
deviation of the vocabulary's norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from expunge.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from expunge.soft_tokens import SoftToken


@dataclass(frozen=True)
class Inversion:
    """How a soft token is learnt.

    Attributes:
        vectors: K, the vectors of the token; it stands in prompts like so many words.
        initial: A text that it starts from; empty starts from random words.
        templates: Sentences in which it is learnt; ``{}`` is its place.
        steps: Optimiser steps.
        batch_size: Pictures of a step, of each kind.
        learning_rate: Of Adam, falling along a cosine; a vector's entries are about 0.03.
        repel: β, how much the token is kept from what it must not draw.
        norm: λ, how much its norms are held to those of words.
    """

    vectors: int = 2
    initial: str = ""
    templates: list[str] = field(default_factory=lambda: ["{}", "a picture of {}"])
    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 1e-2
    repel: float = 1.0
    norm: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.vectors, self.steps, self.batch_size) < 1 or self.vectors > 32:
            raise ValueError(
                f"got vectors {self.vectors}, steps {self.steps}, batch_size {self.batch_size}; "
                "allowed: 1 or more, of vectors up to 32"
            )
        if not self.learning_rate > 0 or not (self.repel >= 0 and self.norm >= 0):
            raise ValueError(
                f"got learning_rate {self.learning_rate}, repel {self.repel}, norm {self.norm}; "
                "allowed: learning_rate above 0, the others 0 or more"
            )
        if not self.templates or not all(t.count("{}") == 1 for t in self.templates):
            raise ValueError(
                f"got templates {self.templates}; allowed: one text or more, each with one {{}}"
            )


def require(pipeline: Any, name: str, how: Inversion) -> None:
    """Refuse what could not be learnt, before anybody has worked for it.

    Args:
        pipeline: A text-to-image model.
        name: The token's name.
        how: Settings.

    Raises:
        UserError: The model has several text encoders, a template is longer than it reads, or the
            initial text says nothing.
    """
    from expunge import soft_tokens

    if (n := len(list(soft_tokens.text_encoders(pipeline)))) != 1:
        raise UserError(
            f"got a model with {n} text encoders; allowed: one, as SD 1.x and 2.x have, with which "
            "alone soft tokens can be learnt; choose another model"
        )
    # Where a prompt is cut off, the token itself may be: it would stay what it began as.
    prompts = [template.replace("{}", name) for template in how.templates]
    soft_tokens.fits(pipeline, prompts, {name: how.vectors})
    if how.initial and not soft_tokens.token_ids(pipeline, how.initial)[1:-1]:
        raise UserError(f"got initial {how.initial!r}; allowed: a text of one word or more")


def invert(
    pipeline: Any,
    name: str,
    latents: Tensor,
    r: Tensor,
    how: Inversion,
    seed: int = 0,
    done: Callable[[float], None] | None = None,
) -> SoftToken:
    """Learn a soft token from pictures; the pipeline knows it afterwards, all else is as it was.

    Args:
        pipeline: A frozen text-to-image model with one text encoder.
        name: The token's name, for example `<bomb>`.
        latents: The pictures, (N, C, h, w), see `expunge.encoding`.
        r: Reward of each, (N,) in [0, 1]: 1 is what the token shall draw, 0 what it shall not.
        how: Settings.
        seed: Of everything drawn.
        done: Called with the loss after each step.

    Raises:
        UserError: No picture with a reward, a name that is taken, or see `require`.
        FloatingPointError: It diverged.
    """
    import torch

    from expunge import prediction, soft_tokens

    require(pipeline, name, how)
    ((tokenizer, encoder),) = soft_tokens.text_encoders(pipeline)
    if not bool(((r >= 0) & (r <= 1)).all()) or not r.sum() > 0:
        raise UserError("got no picture with a reward in (0, 1]; allowed: one or more")
    generator = torch.Generator().manual_seed(seed)
    words = encoder.get_input_embeddings().weight[: tokenizer.vocab_size].detach().float()
    μ, σ = words.norm(dim=1).mean(), words.norm(dim=1).std()
    v = _start(pipeline, words, how, generator).requires_grad_()
    soft_tokens.add(pipeline, soft_tokens.SoftToken(name, [v.detach()]))
    optimizer = torch.optim.Adam([v], lr=how.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    scheduler, unet, device = pipeline.scheduler, pipeline.unet, pipeline.device
    kind = prediction.prediction_type(scheduler)
    T, n = scheduler.config.num_train_timesteps, how.batch_size
    # Others are asked for only where there are some.
    m = n if how.repel and (1 - r).sum() > 0 else 0

    def ε_θ(x_t: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        texts = pipeline.encode_prompt(prompts, device, 1, False)[0]
        ᾱ = prediction.alpha_bar(scheduler, t)
        return prediction.to_epsilon(unet(x_t, t, texts).sample, x_t, ᾱ, kind).float()

    def error(ε: Tensor, predicted: Tensor) -> Tensor:
        return (ε - predicted).square().flatten(1).mean(1)

    with _frozen(pipeline), _in_place(tokenizer, encoder, name, v):
        for _ in range(how.steps):
            chosen = [torch.multinomial(r.float(), n, True, generator=generator)]
            if m:
                chosen.append(torch.multinomial(1 - r.float(), m, True, generator=generator))
            x_0 = latents[torch.cat(chosen)].to(device)
            t = torch.randint(0, T, (n + m,), generator=generator).to(device)
            ε = torch.randn(x_0.shape, generator=generator).to(device)
            sentence = torch.randint(0, len(how.templates), (n + m,), generator=generator)
            prompts = [how.templates[i].replace("{}", name) for i in sentence.tolist()]
            # Not add_noise: a scheduler of σ leaves x_0 + σ ε, which the UNet never sees.
            x_t = prediction.noised(x_0, ε, prediction.alpha_bar(scheduler, t))
            errors = error(ε, ε_θ(x_t, t, prompts))
            loss = errors[:n].mean() + how.norm * ((v.norm(dim=1) - μ) / σ).square().mean()
            if m:
                with torch.no_grad():
                    null = error(ε[n:], ε_θ(x_t[n:], t[n:], [""] * m))
                loss = loss + how.repel * (null - errors[n:]).clamp(min=0).mean()
            if not torch.isfinite(loss):
                raise FloatingPointError("the inversion diverged; lower learning_rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if done is not None:
                done(loss.item())
    found = v.detach().cpu()
    with torch.no_grad():
        rows = encoder.get_input_embeddings().weight
        rows[soft_tokens.token_ids(pipeline, name)[1:-1]] = found.to(rows)
    return soft_tokens.SoftToken(name, [found], soft_tokens.encoder_digests(pipeline))


def _start(pipeline: Any, words: Tensor, how: Inversion, generator: torch.Generator) -> Tensor:
    """K vectors: of the initial text, its last word repeated, or of random words."""
    import torch

    from expunge import soft_tokens

    if not how.initial:
        found = words[torch.randint(0, len(words), (how.vectors,), generator=generator)]
        return found.clone()
    ids = soft_tokens.token_ids(pipeline, how.initial)[1:-1]
    table: Tensor = pipeline.text_encoder.get_input_embeddings().weight
    return table[(ids + [ids[-1]] * how.vectors)[: how.vectors]].detach().float().clone()


@contextmanager
def _frozen(pipeline: Any) -> Iterator[None]:
    """No gradient for what is not learnt; it would cost as much again."""
    parameters = [p for part in (pipeline.unet, pipeline.text_encoder) for p in part.parameters()]
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in zip(parameters, before, strict=True):
            p.requires_grad_(flag)


@contextmanager
def _in_place(tokenizer: Any, encoder: Any, name: str, v: Tensor) -> Iterator[None]:
    """The token's vectors are v, wherever it stands; the table of all words is not touched."""
    import torch

    names = [name, *(f"{name}_{i}" for i in range(1, len(v)))]
    own = torch.tensor(tokenizer.convert_tokens_to_ids(names), device=v.device)

    def put(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        here = inputs[0][..., None] == own  # (B, T, K)
        return torch.where(here.any(-1, keepdim=True), here.to(v) @ v, output.to(v)).to(output)

    handle = encoder.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()
