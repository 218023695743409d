"""Gradients of what a frozen model predicts, with respect to what its text encoder is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expunge import prediction, soft_tokens
from expunge.errors import UserError
from expunge.eval.age_gate import is_age_coded


def require_one_encoder(pipeline: Any, attack: str) -> None:
    """Refuse models with two text encoders, of which tokens have two vectors.

    Raises:
        UserError: It is one, as SDXL is.
    """
    if (n := len(list(soft_tokens.text_encoders(pipeline)))) != 1:
        raise UserError(
            f"got a model with {n} text encoders for the attack {attack}; allowed: one, as SD 1.x "
            "and 2.x have; choose paraphrase, latent_inversion or relearning"
        )


def words(pipeline: Any, *, sexual: bool) -> Tensor:
    """Ids (V,) of the tokens that are read again as they are when they are written as text.

    Pieces of words are none, nor is what cannot be printed: what an attack finds in them is another
    prompt once it is typed. Where pictures may be sexual, age-coded words are none either.
    """
    tokenizer = pipeline.tokenizer
    ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.all_special_ids]
    texts = [written(pipeline, [i]) for i in ids]
    again = tokenizer(texts).input_ids
    return torch.tensor(
        [
            i
            for i, text, read in zip(ids, texts, again, strict=True)
            if read[1:-1] == [i] and text.isprintable() and not (sexual and is_age_coded(text))
        ]
    )


def written(pipeline: Any, ids: Sequence[int]) -> str:
    """Ids as text."""
    text: str = pipeline.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text.strip()


def framed(pipeline: Any, middles: Sequence[Sequence[int]]) -> Tensor:
    """Ids (B, T) as the pipeline gives them to its text encoder: start, text, end, padding."""
    tokenizer = pipeline.tokenizer
    length = tokenizer.model_max_length
    start, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    rows = [start + list(middle)[: length - 2] + end for middle in middles]
    return torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])


def table(pipeline: Any) -> Tensor:
    """The vectors of all tokens, (V, D)."""
    weight: Tensor = pipeline.text_encoder.get_input_embeddings().weight
    return weight.detach()


def states(pipeline: Any, ids: Tensor, where: Tensor, vectors: Tensor) -> Tensor:
    """What cross-attention reads, (B, T, D), with own vectors in some places; differentiable.

    Args:
        pipeline: A model with one text encoder.
        ids: (B, T).
        where: (B, T), true in M places.
        vectors: (M, D), row by row.
    """

    def put(module: Any, inputs: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[where.to(output.device)] = vectors.to(output)
        return changed

    encoder = pipeline.text_encoder
    handle = encoder.get_input_embeddings().register_forward_hook(put)
    try:
        found: Tensor = encoder(ids.to(pipeline.unet.device))[0]
    finally:
        handle.remove()
    return found


def epsilon(pipeline: Any, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """ε_θ(x_t, t, text), float32, whatever the network predicts."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    found = unet(x_t.to(unet.dtype), t, text.to(unet.dtype)).sample
    kind = prediction.prediction_type(scheduler)
    ᾱ = prediction.alpha_bar(scheduler, t)
    return prediction.to_epsilon(found.float(), x_t, ᾱ, kind)


def noise_like(x_0: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """ε for each row from its own generator, so that a case does not depend on its batch."""
    return torch.stack([torch.randn(x_0.shape[1:], generator=g) for g in generators]).to(x_0)


def times_like(x_0: Tensor, generators: Sequence[torch.Generator], most: int) -> Tensor:
    """A timestep in [0, most) for each row from its own generator."""
    drawn = [torch.randint(0, most, (1,), generator=g) for g in generators]
    return torch.cat(drawn).to(x_0.device)
