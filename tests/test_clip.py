"""CLIP sees what its own preprocessing would show it, and refuses what it cannot be."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from expunge.clip import IMAGENET_MEAN, IMAGENET_STD, Clip, load_clip
from expunge.errors import UserError


@pytest.fixture(scope="module")
def clip(tiny_clip: str) -> Clip:
    return load_clip(tiny_clip)


def pictures(n: int = 2, size: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_it_sees_what_open_clips_own_preprocessing_shows(clip: Clip, tiny_clip: str) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip}")
    rng = np.random.default_rng(0)
    for height, width in ((32, 32), (75, 75), (20, 20), (40, 90)):
        # Smooth, as photographs are; Pillow rounds to levels in between.
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        with torch.no_grad():
            theirs = model.eval().encode_image(preprocess(image)[None], normalize=True)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        ours = clip.encode_images(x)
        assert (ours * theirs).sum() > 1 - 1e-4, (height, width)


def test_the_normalisation_is_the_models_own(clip: Clip) -> None:
    x = pictures(size=32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.3, 0.2, 0.25]))
    by_hand = clip.model.encode_image(((x + 1) / 2 - mean) / std)
    torch.testing.assert_close(clip.encode_images(x), by_hand / by_hand.norm(dim=1, keepdim=True))


def test_the_thesis_normalises_as_for_imagenet(clip: Clip, tiny_clip: str) -> None:
    thesis = load_clip(tiny_clip, thesis_compat=True)
    assert (thesis.mean, thesis.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert not torch.allclose(thesis.encode_images(pictures()), clip.encode_images(pictures()))
    assert thesis.sha256 != clip.sha256
    assert thesis.eye == clip.eye


def test_what_has_no_weights_is_part_of_its_hash_and_none_of_its_eye(
    clip: Clip, tiny_clip: str, tmp_path
) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "other")
    table = json.loads((folder / "open_clip_config.json").read_text())
    for changes in (
        {"quick_gelu": True},
        {"text_cfg": table["model_cfg"]["text_cfg"] | {"heads": 4}},
    ):
        changed = table | {"model_cfg": table["model_cfg"] | changes}
        (folder / "open_clip_config.json").write_text(json.dumps(changed))
        other = load_clip(str(folder))
        assert not torch.equal(other.encode_texts(["a bomb"]), clip.encode_texts(["a bomb"]))
        assert other.sha256 != clip.sha256
        assert other.eye == clip.eye
    assert load_clip(tiny_clip).sha256 == clip.sha256
    other.model.visual.conv1.weight.data[0] += 1e-3
    assert Clip("x", other.model, None, (32, 32), clip.mean, clip.std).eye != clip.eye


def test_vectors_are_unit_and_float32_whatever_surrounds_them(clip: Clip) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        images, texts = clip.encode_images(pictures().half()), clip.encode_texts(["a bomb", "a"])
    assert images.dtype == texts.dtype == torch.float32
    assert images.shape == texts.shape == (2, clip.width)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(images, clip.encode_images(pictures().half().float()))


def test_gradient_agrees_with_finite_differences(tiny_clip: str) -> None:
    clip = load_clip(tiny_clip)
    clip.model.double()
    x = pictures(1, 40).double().requires_grad_()
    direction = torch.randn(clip.width, dtype=torch.float64, generator=torch.manual_seed(1))
    (clip.encode_images(x) @ direction).sum().backward()
    for seed in range(3):
        step = torch.randn(x.shape, dtype=torch.float64, generator=torch.manual_seed(seed)) * 1e-6
        with torch.no_grad():
            change = (clip.encode_images(x + step) - clip.encode_images(x - step)) @ direction / 2
        assert change.item() == pytest.approx((x.grad * step).sum().item(), rel=1e-4)


def test_its_weights_never_learn(clip: Clip) -> None:
    assert not clip.model.training
    assert not any(p.requires_grad for p in clip.model.parameters())
    assert not clip.encode_texts(["a bomb"]).requires_grad


def test_a_copy_is_the_same_and_other_weights_are_not(clip: Clip, tiny_clip: str, tmp_path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "copy")
    copy = load_clip(str(tmp_path / "copy"))
    assert copy.sha256 == clip.sha256
    with torch.no_grad():
        next(copy.model.parameters()).mul_(1.001)
    assert Clip("x", copy.model, None, copy.size, copy.mean, copy.std).sha256 != clip.sha256


def test_the_gelu_that_the_weights_were_trained_with_is_used(monkeypatch) -> None:
    """open_clip itself builds ViT-B-16/openai with the wrong one, and only warns."""
    asked = {}

    def create_model(name: str, **options: object) -> torch.nn.Module:
        asked[name] = options
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    for name in ("ViT-B-16/openai", "ViT-B/16/openai", "ViT-B-32/laion2b_s34b_b79k"):
        with pytest.raises(UserError, match="no network"):
            load_clip(name)
    assert asked["ViT-B-16"]["force_quick_gelu"] is True
    assert asked["ViT-B-32"]["force_quick_gelu"] is False
    assert all(options["require_pretrained"] for options in asked.values())


def broken(folder: Path, tiny_clip: str, how: str) -> str:
    shutil.copytree(tiny_clip, folder)
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    if how == "no config":
        config.unlink()
    elif how == "no weights":
        weights.rename(folder / "open_clip_pytorch_model.bin")
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "no JSON":
        config.write_text("{")
    else:
        values = json.loads(config.read_text())
        values["model_cfg"]["embed_dim"] = 8
        config.write_text(json.dumps(values))
    return str(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "holds no open_clip_config.json"),
        ("no weights", "without weights"),
        ("cut weights", "cannot be loaded"),
        ("no JSON", "cannot be loaded"),
        ("another width", "cannot be loaded"),
    ],
)
def test_a_folder_that_is_not_whole_is_one_line(
    how: str, message: str, tiny_clip: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_clip(broken(tmp_path / "clip", tiny_clip, how))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ViT-B-16/openia", "did you mean ViT-B-16/openai"),
        ("emoij", "did you mean emoji"),
        ("/no/such/folder", "a folder with open_clip_config.json"),
        ("hf-hub:nobody/nothing", "cannot be loaded"),
        ("", "unknown CLIP"),
    ],
)
def test_an_unknown_name_says_what_is_near(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint) as error:
        load_clip(name)
    assert "\n" not in str(error.value)


def test_a_missing_bundled_guide_is_one_line(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("expunge.clip.bundled", lambda name: tmp_path / name)
    with pytest.raises(UserError, match="got CLIP emoji, but this installation has no"):
        load_clip("emoji")


def test_pictures_and_texts_of_the_wrong_kind_raise(clip: Clip) -> None:
    with pytest.raises(ValueError, match=r"allowed: \(B, 3, H, W\)"):
        clip.encode_images(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="got pictures on meta"):
        clip.encode_images(torch.zeros(1, 3, 32, 32, device="meta"))
    with pytest.raises(ValueError, match="no text"):
        clip.encode_texts([])
    with pytest.raises(UserError, match="only reads pictures"):
        Clip("eye", clip.model, None, clip.size, clip.mean, clip.std).encode_texts(["a bomb"])
