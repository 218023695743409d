r"""SAFREE, text side (arXiv 2410.12761): prompts without the subspace of a concept.

Vectors are rows: a text is an embedding (D,), a prompt of T tokens (T, D). Everything is computed
from the paper's equations, prompt by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.errors import UserError
from expunge.soft_tokens import token_ids


@dataclass(frozen=True)
class Filter:
    """What is done to one prompt.

    Attributes:
        triggers: Which of its T positions hold a trigger token, (T,).
        projection: (I − P_C) P_I, (D, D), to be applied to their embeddings.
    """

    triggers: Tensor
    projection: Tensor


def projector(vectors: Tensor) -> Tensor:
    """The orthogonal projector (D, D) onto the span of the rows of (N, D).

    By singular values rather than the inverse of a Gram matrix: rows may depend on each other.
    """
    _, sizes, basis = torch.linalg.svd(vectors, full_matrices=False)
    if not sizes.numel():
        return vectors.new_zeros(vectors.shape[1], vectors.shape[1])
    kept: Tensor = basis[sizes > sizes[0] * max(vectors.shape) * torch.finfo(vectors.dtype).eps]
    return kept.T @ kept


def distances(without: Tensor, P_C: Tensor) -> Tensor:
    """‖(I − P_C) p‖ of rows p (N, D): how far texts lie from the subspace of the concept, (N,)."""
    rest: Tensor = without - without @ P_C
    return rest.square().sum(dim=1).sqrt()


def trigger_tokens(without: Tensor, whole: Tensor, P_C: Tensor, alpha: float) -> Tensor:
    """Which of a prompt's n tokens bring it near the concept, (n,).

    Token i is one if the prompt without it lies farther from the concept than the prompts without
    each of the others do on average: d_i ≥ (1 + α) mean_{j≠i} d_j. The only token of a prompt is
    compared with the prompt itself.

    Args:
        without: Embeddings of the prompt without each of its tokens in turn, (n, D).
        whole: Embedding of the prompt, (D,).
        P_C: Projector onto the subspace of the concept, (D, D).
        alpha: α, 0 or more.
    """
    d, n = distances(without, P_C), len(without)
    others = (d.sum() - d) / (n - 1) if n > 1 else distances(whole[None], P_C)
    return d >= (1 + alpha) * others


def project(states: Tensor, filters: Sequence[Filter]) -> Tensor:
    """Embeddings (B, T, D), trigger tokens at (I − P_C) P_I e, all others as they were."""
    changed = torch.stack([e @ f.projection.to(e) for e, f in zip(states, filters, strict=True)])
    triggers = torch.stack([f.triggers for f in filters]).to(states.device)
    return torch.where(triggers[..., None], changed, states)


def filtered_steps(
    before: Tensor, after: Tensor, triggers: Tensor, up_to: int, offset: float, sharpness: float
) -> int:
    """How many steps get the filtered prompt: the more it differs, the more of them.

    round(u · sigmoid(2 k (10 β − t))), β = 1 − mean cos(e_i, e'_i), over the trigger tokens: over
    all positions, most of which are padding, β would never come near t / 10.

    Args:
        before: (T, D).
        after: (T, D).
        triggers: (T,).
        up_to: u, at most so many steps.
        offset: t.
        sharpness: k.
    """
    if not triggers.any():
        return 0
    cos = torch.cosine_similarity(before[triggers].float(), after[triggers].float(), dim=1)
    β = 1 - cos.mean().item()
    # tanh, as the exponential of a logistic function overflows.
    return round(up_to * (1 + math.tanh(sharpness * (10 * β - offset))) / 2)


@torch.no_grad()
def filter_of(pipeline: Any, prompt: str, phrases: Sequence[str], alpha: float) -> Filter:
    """Trigger tokens of a prompt, and the projection for them.

    "Without token i" leaves it out; a text's embedding is that of its end token, in the space of
    the prompt embeddings (both encoders' of SDXL beside each other).

    Args:
        pipeline: Of SD 1.x, SD 2.x or SDXL.
        prompt: Words; what the encoder does not read is not looked at.
        phrases: What spans the subspace of the concept.
        alpha: α.
    """
    tokens = _tokens(pipeline, prompt)
    T = pipeline.tokenizer.model_max_length
    P_C = projector(_ends(pipeline, [_tokens(pipeline, phrase) for phrase in phrases]))
    triggers = torch.zeros(T, dtype=torch.bool)
    if not tokens:
        return Filter(triggers, torch.zeros_like(P_C))
    texts = [tokens, *(tokens[:i] + tokens[i + 1 :] for i in range(len(tokens)))]
    whole, *without = _ends(pipeline, texts)
    P_I = projector(torch.stack(without))
    # The first position is the start token's.
    triggers[1 : len(tokens) + 1] = trigger_tokens(torch.stack(without), whole, P_C, alpha)
    # Of rows, so that P_I acts first.
    return Filter(triggers, P_I - P_I @ P_C)


def _tokens(pipeline: Any, text: str) -> list[int]:
    return token_ids(pipeline, text, truncation=True)[1:-1]


def _ends(pipeline: Any, texts: Sequence[list[int]]) -> Tensor:
    """Embeddings (N, D) of texts given by their tokens, in float64 on the CPU."""
    parts = []
    for suffix in ("", "_2"):
        tokenizer = getattr(pipeline, f"tokenizer{suffix}", None)
        encoder = getattr(pipeline, f"text_encoder{suffix}", None)
        if tokenizer is None or encoder is None:
            continue
        T = tokenizer.model_max_length
        rows = [
            [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
            + [tokenizer.pad_token_id] * (T - len(text) - 2)
            for text in texts
        ]
        ids = torch.tensor(rows, device=pipeline._execution_device)
        if hasattr(pipeline, "text_encoder_2"):
            states = encoder(ids, output_hidden_states=True).hidden_states[-2]
        else:
            states = encoder(ids)[0]
        ends = torch.tensor([len(text) + 1 for text in texts], device=states.device)
        parts.append(states[torch.arange(len(texts), device=states.device), ends])
    if not parts:
        raise UserError(
            f"got a {type(pipeline).__name__} without text encoder; allowed: one with its text "
            "encoders, for SAFREE reads prompts; load them"
        )
    return torch.cat(parts, dim=1).double().cpu()
