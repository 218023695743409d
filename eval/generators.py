"""The only way in which an evaluation sees a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from expunge.eval.cases import AS_SUITE, Sampling
from expunge.generation import generate, picture_size

CPU_PICTURES = 8
CPU_PIXELS = 2 * 512 * 512
LIBRARIES = ("torch", "diffusers", "transformers", "peft")
# Rooms and modules with no part in a picture; what is in neither list may have one.
ELSEWHERE = ("configs", "eval", "exporting", "feedback", "models", "train", "cli.py", "demo.py")


class Generator(Protocol):
    """Makes pictures of prompts, each from its own seed."""

    def identity(self) -> dict[str, Any]:
        """Everything that determines a picture besides prompt and seed, as JSON values."""

    def shape(self, sampling: Sampling) -> int:
        """How many pictures it makes at once."""

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling = AS_SUITE
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]; picture i depends on prompt i and seed i alone."""


class PipelineGenerator:
    """A diffusers pipeline with fixed sampling settings.

    On the CPU a picture is the same to the last bit whatever is made beside it: sums are split by
    the shape of the batch and by the number of threads, so that both are fixed there, batches are
    filled up to their shape, and both are part of the identity. A sampler that corrects some of
    the pictures gives the others no neighbours, so each is made alone. On a GPU pictures agree to
    float noise.

    Args:
        pipeline: A text-to-image pipeline, its adapters active.
        steps: Denoising steps.
        guidance_scale: Scale of classifier-free guidance.
        sampler: The sampler that wraps the pipeline: its name, or all that determines it.
        adapters: What the pipeline's state does not tell of its adapters: file hashes, scales.
        batch_size: Pictures at a time on a GPU.
        threads: Threads of one picture's arithmetic on the CPU.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        steps: int,
        guidance_scale: float,
        sampler: str | Mapping[str, Any] = "plain",
        adapters: Sequence[Mapping[str, Any]] = (),
        batch_size: int = 16,
        threads: int = 1,
    ) -> None:
        self._pipeline = pipeline
        self._steps = steps
        self._guidance_scale = guidance_scale
        self._batch_size = batch_size
        self._threads = threads
        self._alone = sampler != "plain"
        self._cpu = pipeline.unet.device.type == "cpu"
        self._size = height, width = picture_size(pipeline)
        self._identity = {
            "pipeline": type(pipeline).__name__,
            "settings": _own_settings(pipeline),
            "components": component_hashes(pipeline),
            "adapters": [dict(adapter) for adapter in adapters],
            "sampler": sampler if isinstance(sampler, str) else dict(sampler),
            "steps": steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
            "device": pipeline.unet.device.type,
            "software": software(guarded=self._alone),
        }
        if self._cpu:
            self._identity["arithmetic"] = {"batch": self.shape(AS_SUITE), "threads": threads}

    def identity(self) -> dict[str, Any]:
        """Hashes of components and software, settings, adapters, sampler, steps, guidance, size."""
        return dict(self._identity)

    def shape(self, sampling: Sampling) -> int:
        """Pictures in a batch."""
        if not self._cpu:
            return self._batch_size
        height, width = self._size_of(sampling)
        return 1 if self._alone else max(1, min(CPU_PICTURES, CPU_PIXELS // (height * width)))

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling = AS_SUITE
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]."""
        shape, asked = self.shape(sampling), len(prompts)
        fill = -asked % shape if self._cpu else 0
        scale = sampling.guidance_scale
        with threads(self._threads if self._cpu else None):
            return generate(
                self._pipeline,
                [*prompts, *[prompts[-1]] * fill],
                [*seeds, *[seeds[-1]] * fill],
                steps=self._steps,
                guidance_scale=self._guidance_scale if scale is None else scale,
                batch_size=shape,
                size=self._size_of(sampling),
            )[:asked]

    def _size_of(self, sampling: Sampling) -> tuple[int, int]:
        height, width = self._size
        return sampling.height or height, sampling.width or width


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, PyTorch computes with so many threads; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def software(guarded: bool) -> dict[str, str]:
    """What computes: the libraries' versions and, of a sampler of ours, the hash of its source.

    A correction of a sampler then never finds the pictures of before.
    """
    found = {name: torch.__version__ if name == "torch" else version(name) for name in LIBRARIES}
    if not guarded:
        return found
    digest = hashlib.sha256()
    for file, name in _sources():
        digest.update(f"{name}\n".encode() + file.read_bytes())
    return found | {"expunge": digest.hexdigest()}


def _sources() -> list[tuple[Path, str]]:
    """Our modules that may have a part in a picture: the samplers and the trunk."""
    import expunge.sampling

    # In a clone the rooms lie beside the trunk, in an installation within it.
    trunk, room = (Path(package.__path__[0]) for package in (expunge, expunge.sampling))
    own = {file.relative_to(trunk): file for file in trunk.rglob("*.py")}
    own = {name: f for name, f in own.items() if name.parts[0] not in (*ELSEWHERE, "sampling")}
    own |= {"sampling" / file.relative_to(room): file for file in room.rglob("*.py")}
    return [(own[name], name.as_posix()) for name in sorted(own)]


def component_hashes(pipeline: Any) -> dict[str, str]:
    """SHA-256 of what each component of a pipeline is: weights, configuration, vocabulary.

    It is taken from memory, so that it tells a merged, quantised or edited model from its files.
    """
    return {
        name: _component_hash(component)
        for name, component in sorted(pipeline.components.items())
        if component is not None
    }


def _own_settings(pipeline: Any) -> dict[str, Any]:
    """What a pipeline is told besides its components, such as what an empty prompt is to SDXL."""
    # Whether a checker has to be there says nothing of pictures; one that is there is a component.
    others = {*pipeline.components, "requires_safety_checker"}
    told = pipeline.config.items()
    return {k: v for k, v in told if k not in others and not k.startswith("_")}


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
        # What fills a prompt up, and where: SD 2.x pads with another token than 1.x.
        yield component.special_tokens_map
        yield [component.padding_side, component.truncation_side]
    if hasattr(component, "backend_tokenizer"):
        table = json.loads(component.backend_tokenizer.to_str())
        # Both are set anew by every call, so that a used tokenizer would differ from a fresh one.
        yield {k: v for k, v in table.items() if k not in ("padding", "truncation")}
    elif hasattr(component, "bpe_ranks"):
        yield sorted(map(str, component.bpe_ranks.items()))
