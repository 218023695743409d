"""The aesthetic score and HPSv2 on small networks of the real classes."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from expunge.clip import load_clip
from expunge.errors import UserError
from expunge.eval.metrics.aesthetic import Aesthetic
from expunge.eval.metrics.human_preference import HumanPreference
from picture_metrics import cases_of, measured

SIZES = (16, 1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def head() -> dict[str, torch.Tensor]:
    """Random weights under the names of the published file."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for place, before, after in zip(PLACES, SIZES[:-1], SIZES[1:], strict=True):
        weight = torch.randn(after, before, generator=generator) / before**0.5
        found[f"layers.{place}.weight"] = weight
        found[f"layers.{place}.bias"] = torch.randn(after, generator=generator)
    return found


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_aesthetic_is_the_affine_head_on_unit_vectors(
    tiny_clip: str, head: Any, images: torch.Tensor, tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"head{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(head, file)
    settings = Aesthetic(head=file, clip=tiny_clip, device="cpu")
    x = load_clip(tiny_clip).encode_images(images).detach()
    assert torch.allclose(x.norm(dim=1), torch.ones(5))
    for place in PLACES:
        x = x @ head[f"layers.{place}.weight"].T + head[f"layers.{place}.bias"]
    found = measured(settings, cases_of(5), images)
    assert found.value == pytest.approx(x.mean().item(), rel=1e-4)
    assert found.low < found.value < found.high
    assert found.higher_is_better
    assert len(settings.open().protocol()["head"]) == 64


def test_a_head_of_another_clip_or_a_broken_or_missing_one_is_one_line(
    tiny_clip: str, head: Any, tmp_path: Path
) -> None:
    missing, broken, other = (tmp_path / name for name in ("none.pth", "broken.pth", "other.pth"))
    broken.write_bytes(b"nothing")
    torch.save(head | {"layers.0.weight": torch.zeros(1024, 768)}, other)
    fewer = tmp_path / "fewer.pth"
    torch.save({k: v for k, v in head.items() if "7" not in k}, fewer)
    code = tmp_path / "code.pth"
    torch.save({"layers.0.weight": torch.nn.Linear(2, 2)}, code)
    for file, says in (
        (missing, "get it from https://github.com/christophschuhmann"),
        (broken, "cannot be read"),
        (code, "cannot be read"),
        (other, "768 features and CLIP .* of 16"),
        (fewer, "does not fit"),
    ):
        with pytest.raises(UserError, match=says) as error:
            Aesthetic(head=file, clip=tiny_clip).open()
        assert "\n" not in str(error.value)


def test_hps_is_a_hundred_cosines_of_the_checkpoint(
    architecture: str, images: torch.Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = open_clip.create_model(architecture).eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "hps.pt")
    settings = HumanPreference(
        checkpoint=tmp_path / "hps.pt", architecture=architecture, device="cpu"
    )
    small = torch.nn.functional.interpolate(
        (images + 1) / 2, (32, 32), mode="bicubic", antialias=True
    )
    own = model.visual.preprocess_cfg
    mean, std = (torch.tensor(own[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        f = model.encode_image((small - mean) / std, normalize=True)
        tokens = open_clip.get_tokenizer(architecture)([c.prompt for c in cases_of(5)])
        g = model.encode_text(tokens, normalize=True)
    found = measured(settings, cases_of(5), images)
    assert found.value == pytest.approx(100 * (f * g).sum(1).mean().item(), rel=1e-4)
    assert settings.open().protocol()["formula"] == "100 x cosine"


def test_hps_without_its_checkpoint_is_one_line(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no HPSv2 checkpoint at .* get it from https://hugg"):
        HumanPreference(checkpoint=tmp_path / "none.pt", architecture=architecture).open()
    with pytest.raises(UserError, match=r"unknown architecture 'ViT-H-13'; .*ViT-H-14"):
        HumanPreference(checkpoint=tmp_path / "none.pt", architecture="ViT-H-13").open()
    torch.save({"state_dict": {"logit_scale": torch.ones(())}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not fit"):
        HumanPreference(checkpoint=tmp_path / "other.pt", architecture=architecture).open()
