"""Concept ablation from end to end, as its paper uses it: a memorised picture, a style."""

import json

import torch
from PIL import Image
from safetensors.torch import load_file

from expunge.concepts import Concept
from expunge.sampling.load import load_erased
from expunge.train.noised import Noised
from expunge.train.objectives.ablation import Ablation
from expunge.train.preserve import Preserve
from expunge.train.train_erase import train
from small_runs import small_run


def test_a_memorised_picture_is_unlearnt_from_a_folder_without_copies(tiny_sd1, tmp_path) -> None:
    """Everything is learnt from the folder: nothing is drawn, and other pictures teach another."""
    learnt = {}
    for colour in ("red", "blue"):
        folder = tmp_path / colour
        folder.mkdir()
        for side in (16, 20):
            Image.new("RGB", (side, 16), colour).save(folder / f"{side}.png")
        run = small_run(
            tiny_sd1, tmp_path / f"without {colour}", steps=2, preserve=Preserve(),
            concept=Concept(targets=["the night watch"], anchor="men with a flag at night"),
            objective=Ablation(regularisation=1.0, layers="all"),
            latents=Noised(folder=str(folder)),
        )  # fmt: skip
        learnt[colour] = load_file(train(run))
        result = json.loads((tmp_path / f"without {colour}" / "train_result.json").read_text())
        assert result["unet_forwards"]["sampling"] == 0
        assert load_erased(tiny_sd1, [run.output_dir]).get_active_adapters()
    assert any("conv1" in name for name in learnt["red"])
    assert any(not torch.equal(learnt["red"][name], learnt["blue"][name]) for name in learnt["red"])


def test_a_style_becomes_a_plain_picture(tiny_sd1, tmp_path) -> None:
    style = Concept(
        targets=["in the style of van gogh"], anchor="as a painting", templates=["a house {}"]
    )
    run = small_run(
        tiny_sd1, tmp_path / "out", steps=2, preserve=Preserve(), objective=Ablation(),
        latents=Noised(count=2, steps=2), concept=style,
    )  # fmt: skip
    learnt = load_file(train(run))
    assert {name.split(".")[-3] for name in learnt} == {"to_k", "to_v"}
    assert all(tensor.any() for tensor in learnt.values())
