"""Heads on CLIP answer as the networks that they were saved from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from expunge.clip import load_clip
from expunge.errors import UserError
from expunge.eval.detectors.clip_heads import ClipHeads
from expunge.eval.detectors.pickled import read_pickled


def classifier_head(seed: int, width: int = 16) -> nn.Sequential:
    """A head of the multi-headed safety classifier, trained for a moment, but narrow."""
    torch.manual_seed(seed)
    head = nn.Sequential(
        nn.Linear(width, 8), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1)
    )
    # So that the running mean and variance are not those of a new layer.
    for _ in range(20):
        head(3 + torch.randn(64, width))
    return head.eval()


@pytest.fixture
def images() -> Tensor:
    pictures = torch.rand(12, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures[::2] = pictures[::2, :, :1, :1]
    return pictures


def test_a_multi_headed_classifier_from_its_published_files(
    images: Tensor, tiny_clip: str, tmp_path: Path
) -> None:
    heads = {"violent": classifier_head(1), "hateful": classifier_head(2)}
    files = {}
    for label, head in heads.items():
        torch.save(head.state_dict(), tmp_path / f"{label}.pt")
        files[label] = tmp_path / f"{label}.safetensors"
        save_file(read_pickled(tmp_path / f"{label}.pt"), files[label])
    detector = ClipHeads(files, tiny_clip).open()
    assert detector.labels == set(heads)
    # They read what encode_image gives, in its own length.
    clip = load_clip(tiny_clip)
    features = clip.image_features(images)
    assert (features.norm(dim=1) - 1).abs().min() > 0.01
    found = detector.observe(images)
    for label, head in heads.items():
        expected = head(features).sigmoid().squeeze(1)
        torch.testing.assert_close(torch.tensor([seen[label] for seen in found]), expected)
    unit = ClipHeads(files, tiny_clip, unit_length=True).open().observe(images)
    expected = heads["violent"](clip.encode_images(images)).sigmoid().squeeze(1)
    torch.testing.assert_close(torch.tensor([seen["violent"] for seen in unit]), expected)


def test_a_linear_head(images: Tensor, tiny_clip: str, tmp_path: Path) -> None:
    head = nn.Linear(16, 1)
    save_file(head.state_dict(), tmp_path / "linear.safetensors")
    settings = ClipHeads({"odd": tmp_path / "linear.safetensors"}, tiny_clip, unit_length=True)
    expected = head(load_clip(tiny_clip).encode_images(images)).sigmoid().squeeze(1)
    found = torch.tensor([seen["odd"] for seen in settings.open().observe(images)])
    torch.testing.assert_close(found, expected)


def test_what_is_missing_or_unfit_is_one_line(tiny_clip: str, tmp_path: Path) -> None:
    whole = classifier_head(0).state_dict()
    save_file(classifier_head(0, width=9).state_dict(), tmp_path / "narrow.safetensors")
    save_file(
        {k: v for k, v in whole.items() if k != "3.running_var"}, tmp_path / "part.safetensors"
    )
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    save_file({"weight": torch.zeros(3), "bias": torch.zeros(1)}, tmp_path / "flat.safetensors")
    save_file(
        {"weight": torch.full((1, 16), float("nan")), "bias": torch.zeros(1)},
        tmp_path / "nan.safetensors",
    )
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    for name, said in (
        ("none", "does not exist"),
        ("narrow", "width 9"),
        ("part", "running_var"),
        ("other", "cannot be read"),
        ("flat", "cannot be read"),
        ("nan", "NaN"),
        ("broken", "cannot be read"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            ClipHeads({"a": tmp_path / f"{name}.safetensors"}, tiny_clip).open()
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="no heads"):
        ClipHeads({})


def test_nan_raises(tiny_clip: str, tmp_path: Path) -> None:
    save_file(classifier_head(0).state_dict(), tmp_path / "head.safetensors")
    detector = ClipHeads({"a": tmp_path / "head.safetensors"}, tiny_clip).open()
    with pytest.raises(FloatingPointError, match="for a"):
        detector.observe(torch.full((1, 3, 8, 8), float("nan")))
