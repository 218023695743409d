"""Real LoRA on tiny pipelines: attached, filled with numbers, saved by expunge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge import adapters, backbones
from expunge.results import sha256_folder

Maker = Callable[..., Path]


@pytest.fixture(scope="session")
def make_lora(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """A LoRA file as `expunge train` leaves it, for a tiny pipeline's folder."""

    def make(
        model: str,
        group: str = "x",
        rank: int = 4,
        alpha: float = 16.0,
        concept: str = "bomb",
        seed: int = 0,
        scale: float = 0.1,
        about: dict | None = None,
    ) -> Path:
        pipeline = backbones.load_pipeline(model)
        modules = backbones.modules_of(pipeline.unet, group)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapters.attach(pipeline.unet, modules, rank, alpha, seed):
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        said = {
            "objective": "esd",
            "concept": {"name": concept, "targets": [f"a {concept}"]},
            "model": model,
            "base_sha256": sha256_folder(model),
            "seed": seed,
            "steps": 7,
        }
        folder = tmp_path_factory.mktemp("lora")
        return adapters.save(pipeline, folder, said if about is None else about)

    return make


@pytest.fixture(scope="session")
def latents() -> Callable[..., torch.Tensor]:
    """As a user of plain diffusers would compare: at another seed and length than the command."""

    @torch.no_grad()
    def draw(pipeline, prompt: str = "a bomb") -> torch.Tensor:
        return pipeline(
            prompt,
            generator=torch.Generator().manual_seed(77),
            num_inference_steps=3,
            guidance_scale=5.0,
            output_type="latent",
        ).images.float()

    return draw


@pytest.fixture(scope="session")
def in_place() -> Callable[..., Any]:
    """The pipeline of a model with LoRA files active in it."""

    def load(model: str, *loras: Path) -> Any:
        pipeline = backbones.load_pipeline(model)
        adapters.load(pipeline, [str(lora) for lora in loras])
        return pipeline

    return load
