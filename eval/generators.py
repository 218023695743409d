"""The only way in which an evaluation sees a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from expunge.generation import generate, picture_size


class Generator(Protocol):
    """Makes pictures of prompts, each from its own seed."""

    def identity(self) -> dict[str, Any]:
        """Everything that determines a picture besides prompt and seed, as JSON values."""

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]; picture i depends on prompt i and seed i alone."""


class PipelineGenerator:
    """A diffusers pipeline with fixed sampling settings.

    Args:
        pipeline: A text-to-image pipeline, its adapters active.
        steps: Denoising steps.
        guidance_scale: Scale of classifier-free guidance.
        sampler: The sampler that wraps the pipeline: its name, or all that determines it.
        adapters: What the pipeline's state does not tell of its adapters: file hashes, scales.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        steps: int,
        guidance_scale: float,
        sampler: str | Mapping[str, Any] = "plain",
        adapters: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._pipeline = pipeline
        self._steps = steps
        self._guidance_scale = guidance_scale
        height, width = picture_size(pipeline)
        self._identity = {
            "pipeline": type(pipeline).__name__,
            "components": component_hashes(pipeline),
            "adapters": [dict(adapter) for adapter in adapters],
            "sampler": sampler if isinstance(sampler, str) else dict(sampler),
            "steps": steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
            "device": pipeline.unet.device.type,
        }

    def identity(self) -> dict[str, Any]:
        """Hashes of all components, adapters, sampler, steps, guidance, size, dtype, device."""
        return dict(self._identity)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], B at a time."""
        return generate(
            self._pipeline,
            prompts,
            seeds,
            steps=self._steps,
            guidance_scale=self._guidance_scale,
            batch_size=len(prompts),
        )


def component_hashes(pipeline: Any) -> dict[str, str]:
    """SHA-256 of what each component of a pipeline is: weights, configuration, vocabulary.

    It is taken from memory, so that it tells a merged, quantised or edited model from its files.
    """
    return {
        name: _component_hash(component)
        for name, component in sorted(pipeline.components.items())
        if component is not None
    }


def _component_hash(component: Any) -> str:
    digest = hashlib.sha256(type(component).__name__.encode())
    for part in _settings(component):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    if isinstance(component, nn.Module):
        for name, tensor in sorted(component.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(component: Any) -> Iterator[Any]:
    config: Any = getattr(component, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        # What starts with _ tells where it was loaded from and by which version.
        private = ("_", "transformers_version")
        yield {k: v for k, v in config.items() if not k.startswith(private)}
    if hasattr(component, "get_vocab"):
        yield component.get_vocab()
        yield component.model_max_length
    if hasattr(component, "backend_tokenizer"):
        table = json.loads(component.backend_tokenizer.to_str())
        # Both are set anew by every call, so that a used tokenizer would differ from a fresh one.
        yield {k: v for k, v in table.items() if k not in ("padding", "truncation")}
    elif hasattr(component, "bpe_ranks"):
        yield sorted(map(str, component.bpe_ranks.items()))
