"""Pictures of the bundled model, and noise to spoil them with."""

import json
from collections.abc import Callable

import open_clip
import pytest
import torch
from torch import Tensor

from expunge.backbones import load_pipeline
from expunge.eval.cases import Case, Question
from expunge.generation import generate

OBJECTS = ("bomb", "balloon", "cat face", "pizza", "rocket", "dagger")
SEEDS = range(4)


@pytest.fixture(scope="session")
def emoji() -> tuple[list[Case], Tensor]:
    """24 pictures of the bundled model: six prompts, four seeds each."""
    pipeline = load_pipeline("emoji")
    pipeline.set_progress_bar_config(disable=True)
    asked = [(f"a {name}", seed, name) for seed in SEEDS for name in OBJECTS]
    prompts, seeds = [x[0] for x in asked], [x[1] for x in asked]
    images = generate(pipeline, prompts, seeds, steps=4, guidance_scale=4.0, batch_size=24)
    cases = [
        Case(text, seed, "kept", (name,), (Question("kept", (f"object/{name}",)),))
        for text, seed, name in asked
    ]
    return cases, images.clamp(-1, 1)


@pytest.fixture(scope="session")
def spoiled(emoji: tuple[list[Case], Tensor]) -> Callable[[float], Tensor]:
    """The same pictures under noise of a strength."""

    def spoil(strength: float) -> Tensor:
        noise = torch.randn(emoji[1].shape, generator=torch.Generator().manual_seed(5))
        return (emoji[1] + strength * noise).clamp(-1, 1)

    return spoil


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small CLIP that open_clip knows by name, as it knows ViT-H-14."""
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "ViT-tiny-hps.json").write_text(
        json.dumps(
            {
                "embed_dim": 16,
                "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
                "text_cfg": {
                    "context_length": 77,
                    "vocab_size": 49408,
                    "width": 32,
                    "heads": 2,
                    "layers": 1,
                },
            }
        )
    )
    open_clip.add_model_config(folder)
    return "ViT-tiny-hps"
