"""A concept in pictures: who looks at them, and that nobody overlooks them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from expunge import adapters
from expunge.concepts import Concept
from expunge.densities.clip_images import ClipImages
from expunge.densities.clip_text import ClipText
from expunge.densities.combination import Combination
from expunge.errors import UserError
from expunge.train import pictured
from expunge.train.latents import Rollout
from expunge.train.noised import Noised
from expunge.train.objectives.ablation import Ablation
from expunge.train.objectives.density import Density
from expunge.train.objectives.esd import Esd
from expunge.train.objectives.sdd import Sdd
from expunge.train.objectives.slider import Slider
from expunge.train.objectives.twin import Twin
from expunge.train.objectives.uce import Uce
from expunge.train.preserve import Preserve
from expunge.train.sight import Gate
from expunge.train.train_erase import train
from small_runs import small_run

SEEN = ClipText(threshold=-1.0)


@pytest.fixture
def folder(tmp_path) -> str:
    """Three pictures of one colour each."""
    path = tmp_path / "shown"
    path.mkdir()
    for colour in ("red", "blue", "grey"):
        Image.new("RGB", (16, 16), colour).save(path / f"{colour}.png")
    return str(path)


def shown(images: str) -> Concept:
    return Concept(targets=["a bomb"], anchor="a key", images=images)


def test_latents_that_name_no_folder_are_of_the_concepts(tiny_sd1, tmp_path, folder) -> None:
    run = small_run(
        tiny_sd1, tmp_path / "out", steps=2, preserve=Preserve(), latents=Noised(steps=2),
        concept=shown(folder),
    )  # fmt: skip
    named = replace(
        run, output_dir=str(tmp_path / "named"), latents=Noised(steps=2, folder=folder),
        concept=shown(""),
    )  # fmt: skip
    ours, theirs = (load_file(train(r)) for r in (run, named))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    said = adapters.read_metadata(tmp_path / "out" / adapters.FILE)["concept"]
    assert len(said["images"]) == 64
    assert str(tmp_path) not in str(adapters.read_header(tmp_path / "out" / adapters.FILE))
    said = adapters.read_metadata(tmp_path / "named" / adapters.FILE)["concept"]
    assert "images" not in said  # so that files without pictures are what they were


def test_a_density_that_names_no_folder_sees_the_concepts(tiny_sd1, tmp_path, folder) -> None:
    deep = Combination([SEEN, ClipImages()])
    for changes in ({"objective": Density(density=ClipImages())}, {"gate": Gate(density=deep)}):
        run = small_run(tiny_sd1, tmp_path / "out", concept=shown(folder), **changes,
                        preserve=Preserve())  # fmt: skip
        assert pictured.looked_at(run)
        assert pictured.latents_of(run) == run.latents
    ours, theirs = ClipImages().build(shown(folder)), ClipImages(folder).build(shown(""))
    assert ours.identity() == theirs.identity()
    assert ours.names == ["a bomb"]


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": Esd(), "latents": Rollout()},
        {"objective": Sdd(), "latents": Noised(folder="mine")},
        {"objective": Ablation(), "latents": Noised()},
        {"objective": Esd(erase_from="a weapon"), "latents": Noised()},
        {"objective": Slider(subject="a weapon"), "latents": Noised()},
        {"objective": Twin(), "start": Uce(), "latents": Noised()},
        {"objective": Uce(), "latents": Noised()},
        {"objective": Density(density=ClipImages("mine"))},
    ],
    ids=str,
)
def test_pictures_that_nobody_looks_at_are_refused(tmp_path, changes) -> None:
    with pytest.raises(ValueError, match=r"got concept\.images .* allowed: latents\.type noised"):
        small_run("emoji", tmp_path / "out", concept=shown("some"), preserve=Preserve(), **changes)


@pytest.mark.parametrize("where", ["latents", "density"])
def test_a_folder_that_cannot_be_used_leaves_nothing(tiny_sd1, tmp_path, folder, where) -> None:
    changes = {
        "latents": {"objective": Sdd(ema_decay=0.9), "latents": Noised()},
        "density": {"objective": Density(density=ClipImages())},
    }[where]
    run = small_run(tiny_sd1, tmp_path / "out", preserve=Preserve(), **changes,
                    concept=shown(folder))  # fmt: skip
    (tmp_path / "empty").mkdir()
    broken = Path(folder) / "red.png"
    broken.write_bytes(broken.read_bytes()[:40])
    for images, said in (("none", "no folder"), ("empty", "no picture"), ("shown", "cannot be")):
        with pytest.raises(UserError, match=said) as error:
            train(replace(run, concept=shown(str(tmp_path / images))))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


def test_without_any_pictures_the_density_says_where_they_go(tiny_sd1, tmp_path) -> None:
    run = small_run(tiny_sd1, tmp_path / "out", objective=Density(density=ClipImages()))
    with pytest.raises(UserError, match=r"without pictures.*concept\.images"):
        train(run)
    assert not (tmp_path / "out").exists()
