"""Every shipped configuration trains, made small: on the model that it is for, or one of its shape.

What is overridden is how much of everything there is, never what the objective is.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from expunge import adapters, backbones
from expunge.configuration import parse
from expunge.train.config import TrainConfig
from expunge.train.train_erase import train

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "train"
EMOJI = sorted(CONFIGS.glob("emoji_*.yaml"))
FEW = [
    "--steps", "2", "--batch_size", "2", "--latents.steps", "2", "--validation.steps", "1",
    "--validation.seeds", "1", "--validation.prompts", "[a bomb]",
]  # fmt: skip


def small(name: str, folder: Path, *more: str) -> TrainConfig:
    """Two steps of a shipped configuration; `more` are words of the command line."""
    words = ["--config", str(CONFIGS / name), "--output_dir", str(folder), *FEW]
    shipped = parse(TrainConfig, words)
    if shipped.preserve.weight:
        words += ["--preserve.batch_size", "2"]
    for latents in ("rollouts", "count"):
        if hasattr(shipped.latents, latents):
            words += [f"--latents.{latents}", "4"]
    return parse(TrainConfig, [*words, *more])


@pytest.fixture(scope="module")
def plain() -> StableDiffusionPipeline:
    """The bundled model as anyone loads it."""
    return StableDiffusionPipeline.from_pretrained(backbones.bundled("emoji"))


def bomb(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    """What the UNet predicts of noise under the target, (1, C, h, w)."""
    states, _ = pipeline.encode_prompt("a bomb", "cpu", 1, do_classifier_free_guidance=False)
    x_t = torch.randn(1, *backbones.latent_shape(pipeline), generator=torch.manual_seed(0))
    with torch.no_grad():
        return pipeline.unet(x_t, torch.tensor(500), states).sample


@pytest.mark.parametrize("file", EMOJI, ids=lambda file: file.stem)
def test_on_the_bundled_model_it_leaves_a_lora_for_plain_diffusers(file, plain, tmp_path) -> None:
    train(small(file.name, tmp_path / "out"))
    before = bomb(plain)
    plain.load_lora_weights(tmp_path / "out", weight_name=adapters.FILE)
    try:
        after = bomb(plain)
    finally:
        plain.unload_lora_weights()
    assert torch.isfinite(after).all()
    assert not torch.allclose(after, before, atol=1e-6)
    assert torch.equal(bomb(plain), before)


def full_size(family: str, model: str, clip: str, folder: Path, *more: str) -> TrainConfig:
    """The configuration for a model that is not at hand, on a tiny one of its shape."""
    words = ["--model", model, "--objective.density.clip", clip, "--checkpoint_every", "1"]
    # A random network sees what it does; a bank a step, so that every step asks the teacher anew.
    words += ["--objective.density.threshold", "-1", "--latents.refresh", "1"]
    # Its tokenizer knows few words, and the text encoder reads 24 tokens.
    words += ["--concept.templates", '["{}"]', "--concept.preserve", '["", a key, a cat face]']
    words += ["--start.sentences", '["{}", "{} in ink style"]']
    return small(f"{family}_cigarette_density.yaml", folder, *words, *more)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_is_shipped_for_a_full_size_learns(family, request, tiny_clip, tmp_path) -> None:
    """Anchored, begun with UCE, in bfloat16, with gradient checkpointing and offload, together."""
    run = full_size(family, request.getfixturevalue(f"tiny_{family}"), tiny_clip, tmp_path / "out")
    assert (run.mixed_precision, run.base_precision) == ("bf16", "bf16")
    assert run.gradient_checkpointing
    assert run.offload
    train(run)
    states = tmp_path / "out" / "checkpoints"
    one, two = (load_file(states / f"step-00000{n}" / "adapter.safetensors") for n in (1, 2))
    assert all(torch.isfinite(v).all() and v.dtype == torch.float32 for v in two.values())
    assert all((v != one[name]).any(0).all() for name, v in two.items() if "lora_B" in name)
    result = json.loads((tmp_path / "out" / "train_result.json").read_text())
    assert result["sights"]["seen"] == result["sights"]["looked"] > 0


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_there_gradient_checkpointing_changes_nothing(family, request, tiny_clip, tmp_path) -> None:
    """Though the guide asks the teacher between the student's forward and its backward."""
    found = []
    for checkpointing in ("false", "true"):
        words = ["--mixed_precision", "no", "--base_precision", "fp32"]
        words += ["--gradient_checkpointing", checkpointing]
        model, out = request.getfixturevalue(f"tiny_{family}"), tmp_path / checkpointing
        found.append(load_file(train(full_size(family, model, tiny_clip, out, *words))))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, atol=1e-7, rtol=1e-5)
