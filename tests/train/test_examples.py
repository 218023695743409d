"""A concept is given by example pictures, or by a probe that was trained on some."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from expunge import adapters, backbones
from expunge.densities.clip_head import ClipHead
from expunge.densities.clip_images import ClipImages
from expunge.densities.head_training import train_head
from expunge.errors import UserError
from expunge.generation import generate
from expunge.pictures import save_png, to_pil
from expunge.train.config import TrainConfig
from expunge.train.latents import Replay
from expunge.train.objectives.density import Density
from expunge.train.sight import Gate
from expunge.train.train_erase import train
from small_runs import small_run

SEEN = {"pictures": 0.5, "probe": 0.5}  # η: a cosine, and a probability


@pytest.fixture(scope="module")
def folders(tiny_sd1, tmp_path_factory) -> dict[str, Path]:
    """`harmful` and `benign` pictures: of `bombs`, the tiny model's; of `colours`, the others."""
    pipeline = backbones.load_pipeline(tiny_sd1)
    bombs = generate(pipeline, ["a bomb"] * 6, range(6), steps=3, guidance_scale=4.0)
    colours = torch.rand(6, 3, 1, 1, generator=torch.manual_seed(0)).expand_as(bombs)
    found = {}
    for name, harmful, benign in (("bombs", bombs, colours), ("colours", colours, bombs)):
        found[name] = tmp_path_factory.mktemp(name)
        for kind, images in (("harmful", harmful), ("benign", benign)):
            (found[name] / kind).mkdir()
            for index, image in enumerate(images):
                save_png(to_pil(image), found[name] / kind / f"{index}.png")
    return found


def run_of(by: str, how: str, folder: Path, model: str, clip: str, out: Path) -> TrainConfig:
    """By the pictures in `folder`, or by a probe of them."""
    density: Any = ClipImages(str(folder / "harmful"), clip, threshold=SEEN[by])
    if by == "probe":
        train_head(folder, out.with_suffix(".safetensors"), clip, steps=50)
        density = ClipHead(str(out.with_suffix(".safetensors")), threshold=SEEN[by])
    changes: dict[str, Any] = {"gate": Gate(density)}
    if how != "gate":
        changes = {"objective": Density(density, direction=how, places=2)}
    latents = Replay(steps=3, source="teacher", rollouts=4, refresh=3)
    return small_run(model, out, latents=latents, **changes)


@pytest.mark.parametrize("by", SEEN)
@pytest.mark.parametrize("how", ["text", "gradient", "gate"])
def test_it_learns_where_it_is_seen(by, how, folders, tiny_sd1, tiny_clip, tmp_path) -> None:
    out = tmp_path / "out"
    train(run_of(by, how, folders["bombs"], tiny_sd1, tiny_clip, out))
    sights = json.loads((out / "train_result.json").read_text())["sights"]
    assert sights["seen"] > sights["looked"] / 2
    learnt = load_file(out / adapters.FILE)
    assert all(v.any(0).all() for name, v in learnt.items() if "lora_B" in name)


def test_a_probe_of_other_pictures_sees_nothing(folders, tiny_sd1, tiny_clip, tmp_path) -> None:
    run = run_of("probe", "text", folders["colours"], tiny_sd1, tiny_clip, tmp_path / "out")
    with pytest.raises(UserError, match="saw the concept in none"):
        train(run)
