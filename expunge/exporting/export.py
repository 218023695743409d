"""One export: measure the adapter in place, write, read back, compare."""

from __future__ import annotations

import re
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor

from expunge import adapters, backbones
from expunge.errors import UserError
from expunge.exporting import deltas, interference, kohya, lora_file, merged, readback, source
from expunge.exporting.deltas import Layers
from expunge.results import provenance, sha256_file

if TYPE_CHECKING:
    from expunge.exporting.command import ExportConfig

SCHEMA = 1
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Export:
    """One export of LoRA files on their base.

    Args:
        config: What is asked for.
        sources: The LoRA.
        model: The base.
        base_sha256: Of its folder; None for one of the hub.
        device: Where latents are compared.
    """

    def __init__(
        self,
        config: ExportConfig,
        sources: list[source.Source],
        model: str,
        base_sha256: str | None,
        device: str,
    ) -> None:
        self.config, self.sources, self.model, self.device = config, sources, model, device
        self.about = source.about(sources, model, base_sha256)
        self.base_sha256 = base_sha256
        own = [s.targets[0] if s.targets else "a photo" for s in sources]
        self.prompts = list(dict.fromkeys([*own, ""]))
        self.own = [self.prompts.index(prompt) for prompt in own]

    def run(self, folder: Path) -> dict[str, Any]:
        """Write the files into an empty folder and return the record of it.

        Raises:
            UserError: Model and LoRA do not fit, or cannot be exported so.
            RuntimeError: What was read back is not what it should be.
        """
        config = self.config
        pipeline = backbones.load_pipeline(self.model, device=self.device)
        base = self._latents(pipeline)
        names = adapters.load(pipeline, config.lora, config.lora_scale)
        loras = [deltas.read(pipeline, name) for name in names]
        in_place = self._latents(pipeline)
        disturbed = self._interference(pipeline, names, loras, base, in_place)
        layers, lost = deltas.total(loras), 0.0
        if config.combine == "svd":
            highest = max(delta.rank for part in loras for delta in part.values())
            layers, lost = deltas.cut(layers, config.rank or highest)
            deltas.put_in_place(pipeline.unet, layers)
            in_place = self._latents(pipeline)
        layers = deltas.uniform(layers)

        dtype = self._dtype()
        digests = self._write(layers, pipeline, folder, dtype)
        del pipeline
        found = self._latents(self._read_back(folder, digests))
        precision = self._precision(layers, dtype)
        comparison = readback.compare(base, in_place, found, precision)
        readback.require(comparison, precision)
        tensors = readback.require_written(folder, digests)
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        one = next(iter(layers.values()))
        return {
            "schema_version": SCHEMA,
            "to": config.to,
            "part": config.part if config.to == "merged" else None,
            "model": self.model,
            "base_sha256": self.base_sha256,
            "lora": [self._row(*pair) for pair in zip(self.sources, loras, strict=True)],
            "lora_scale": config.lora_scale,
            "combine": config.combine,
            "lost": lost,
            "layers": len(layers),
            "rank": one.rank,
            "alpha": one.alpha,
            "dtype": self._dtype_in_words(dtype),
            "files": {name: sha256_file(folder / name) for name in files},
            "verified": asdict(comparison)
            | {
                "prompts": self.prompts,
                "seed": config.seed,
                "steps": config.steps,
                "guidance_scale": backbones.recommended_guidance(self.model),
                "tensors": tensors,
            },
            "interference": disturbed,
            "provenance": provenance(),
        }

    def _latents(self, pipeline: Any) -> Tensor:
        return readback.latents(
            pipeline,
            self.prompts,
            seed=self.config.seed,
            steps=self.config.steps,
            guidance_scale=backbones.recommended_guidance(self.model),
        )

    def _interference(
        self,
        pipeline: Any,
        names: list[str],
        loras: list[Layers],
        base: Tensor,
        together: Tensor,
    ) -> dict[str, Any]:
        """Of every two in their weights; of every one in what it does on its own prompt."""
        if len(names) == 1:
            return {"pairs": [], "moved": []}
        pairs = [
            {"one": self.sources[i].concept, "other": self.sources[j].concept}
            | interference.in_weights(loras[i], loras[j])
            for i, j in combinations(range(len(names)), 2)
        ]
        moved = []
        for name, index in zip(names, self.own, strict=True):
            pipeline.set_adapters([name], [self.config.lora_scale])
            alone = self._latents(pipeline)
            moved.append(interference.in_latents(base[index], alone[index], together[index]))
        pipeline.set_adapters(names, [self.config.lora_scale] * len(names))
        return {"pairs": pairs, "moved": moved}

    def _dtype(self) -> torch.dtype | None:
        """Of what is written; None leaves every tensor of a merged model its own."""
        if self.config.dtype != "auto":
            found: torch.dtype = getattr(torch, self.config.dtype)
            return found
        if self.config.to == "merged":
            return None
        if len(self.sources) > 1 or self.config.combine == "svd":
            return torch.float32
        with safe_open(self.sources[0].file, "pt") as stream:
            keys = [key for key in stream.keys() if not key.endswith(".alpha")]  # noqa: SIM118
            kinds = {stream.get_slice(key).get_dtype() for key in keys}
        return _DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32

    def _precision(self, layers: Layers, dtype: torch.dtype | None) -> torch.dtype:
        """float32 where nothing was rounded, else the type that it was rounded to."""
        if dtype is None:
            return torch.float32
        values = [t for delta in layers.values() for t in (delta.A, delta.B)]
        exact = self.config.to != "merged" and all(
            torch.equal(t.to(dtype).float(), t) for t in values
        )
        return torch.float32 if exact else dtype

    def _dtype_in_words(self, dtype: torch.dtype | None) -> str:
        if dtype is None:
            return "as the base has them; what was changed, float32"
        return str(dtype).removeprefix("torch.")

    def _write(
        self, layers: Layers, pipeline: Any, folder: Path, dtype: torch.dtype | None
    ) -> dict[str, str]:
        if dtype is None or self.config.to == "merged":
            base = merged.locate(backbones.resolve(self.model))
            return merged.write(base, folder, layers, dtype, self.config.part)
        if self.config.to == "kohya":
            name = self.config.name or _file_name(self.sources)
            return kohya.write(layers, pipeline, folder, name, dtype, self.about)
        return lora_file.write(layers, folder, dtype, self.about)

    def _read_back(self, folder: Path, digests: dict[str, str]) -> Any:
        """A fresh pipeline made of what was written, by diffusers' own readers."""
        plain = {"use_safetensors": True, "dtype": torch.float32}
        if self.config.to == "merged" and self.config.part == "pipeline":
            pipeline = DiffusionPipeline.from_pretrained(folder, **plain).to(self.device)
            pipeline.set_progress_bar_config(disable=True)
            return _without_adapter(pipeline)
        pipeline = backbones.load_pipeline(self.model, device=self.device)
        if self.config.to == "merged":
            unet = type(pipeline.unet).from_pretrained(folder / "unet", **plain)
            pipeline.unet = unet.to(self.device)
            return _without_adapter(pipeline)
        try:
            # load_lora_weights, and that no tensor of the file was left out.
            adapters.load(pipeline, [str(folder / name) for name in digests])
        except UserError as error:
            raise RuntimeError(f"what was written cannot be read back: {error}") from error
        return pipeline

    def _row(self, read: source.Source, layers: Layers) -> dict[str, Any]:
        one = next(iter(layers.values()))
        return {
            "file": str(read.file),
            "sha256": read.sha256,
            "concept": read.concept,
            "objective": read.objective,
            "layers": len(layers),
            "rank": one.rank,
            "alpha": one.alpha,
        }


def _without_adapter(pipeline: Any) -> Any:
    """The merged model, in which nothing may be left to switch off."""
    names = [name for name, _ in pipeline.unet.named_modules() if "lora" in name]
    if names or hasattr(pipeline.unet, "peft_config"):
        raise RuntimeError(f"the merged model still holds an adapter: {names[:1]}")
    return pipeline


def _file_name(sources: list[source.Source]) -> str:
    words = [re.sub(r"[^a-z0-9]+", "-", s.concept.lower()).strip("-") for s in sources]
    return "-".join(["erase", *filter(None, words)])[:80]
