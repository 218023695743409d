"""Load a model with its LoRA, or fail: an adapter that is not active is an error, not a warning."""

from collections.abc import Sequence
from typing import Any

import torch

from expunge import adapters, backbones, soft_tokens
from expunge.errors import UserError


def load_erased(
    model: str,
    lora: list[str],
    lora_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Any:
    """The pipeline of a model with erasing LoRA files active in it.

    Args:
        model: `emoji`, a diffusers folder, or a hub id.
        lora: Folders or files; all of them are active together.
        lora_scale: Strength of every LoRA; 1 is what was trained.
        dtype: Of the weights.
        device: Where the pipeline runs.

    Raises:
        UserError: No LoRA is given, or the model or a LoRA is missing, broken, or does not fit.
    """
    if not lora:
        raise UserError("got no LoRA; allowed: one or more; without one nothing is erased")
    return load_model(model, lora, lora_scale, dtype, device)


def load_model(
    model: str,
    lora: list[str],
    lora_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tokens: Sequence[str] = (),
) -> Any:
    """As `load_erased`, but without LoRA it is the model as it is.

    Args:
        model: As there.
        lora: As there; may be empty.
        lora_scale: As there.
        dtype: As there.
        device: As there.
        tokens: Files of soft tokens that prompts may name.
    """
    # Whether the files are there is known in an instant; loading a model is not.
    for file in lora:
        adapters.read_header(file)
    for token in tokens:
        soft_tokens.read(token)
    pipeline = backbones.load_pipeline(model, dtype, device)
    soft_tokens.load(pipeline, tokens)
    adapters.load(pipeline, lora, lora_scale)
    return pipeline
