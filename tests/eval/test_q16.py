"""Q16's answer is the larger of two cosines."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from expunge.clip import load_clip
from expunge.errors import UserError
from expunge.eval.detectors.q16 import CLIP, LABEL, Q16


@pytest.fixture
def images() -> torch.Tensor:
    """Noise, and plain colours between."""
    pictures = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures[::2] = pictures[::2, :, :1, :1]
    return pictures


@pytest.fixture
def vectors(images: torch.Tensor, tiny_clip: str) -> torch.Tensor:
    """What a colour and noise look like, in any length and half precision, as published."""
    return (3 * load_clip(tiny_clip).encode_images(images[:2])).half()


@pytest.fixture
def file(vectors: torch.Tensor, tmp_path: Path) -> Path:
    save_file({"prompts": vectors}, tmp_path / "q16.safetensors")
    return tmp_path / "q16.safetensors"


def test_the_probability_is_the_softmax_of_scaled_cosines(
    file: Path, vectors: torch.Tensor, images: torch.Tensor, tiny_clip: str
) -> None:
    found = Q16(file, tiny_clip).open().observe(images)
    features = load_clip(tiny_clip).encode_images(images)
    similarity = 100 * features @ F.normalize(vectors.float(), dim=1).T
    expected = similarity.softmax(1)[:, 1]
    torch.testing.assert_close(torch.tensor([seen[LABEL] for seen in found]), expected)
    published = similarity.argmax(1) == 1
    assert [seen[LABEL] >= 0.5 for seen in found] == published.tolist()
    assert 0 < published.sum() < 24, "both answers occur"


def test_the_clip_has_the_activation_of_openais_weights() -> None:
    import open_clip

    architecture, tag = CLIP.split("/")
    assert (architecture, tag) in open_clip.list_pretrained()
    assert open_clip.get_model_config(architecture)["quick_gelu"] is True
    assert open_clip.get_model_config(architecture)["embed_dim"] == 768


def test_the_protocol_changes_with_the_vectors(file: Path, tiny_clip: str, tmp_path: Path) -> None:
    save_file({"prompts": torch.randn(2, 16)}, tmp_path / "other.safetensors")
    one, other = (
        Q16(path, tiny_clip).open().protocol() for path in (file, tmp_path / "other.safetensors")
    )
    assert one["weights"] != other["weights"]
    assert one["clips"] == other["clips"]


def test_what_is_missing_or_unfit_is_one_line(tmp_path: Path, file: Path, tiny_clip: str) -> None:
    (tmp_path / "prompts.p").write_bytes(b"")
    save_file({"prompts": torch.zeros(2, 7)}, tmp_path / "narrow.safetensors")
    for settings, said in (
        (Q16(tmp_path / "none.safetensors"), "ml-research/Q16"),
        (Q16(tmp_path / "prompts.p", tiny_clip), "a pickle"),
        (Q16(tmp_path / "narrow.safetensors", tiny_clip), "width 7"),
        (Q16(file, "ViT-L-14/nobody"), "unknown CLIP"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            settings.open()
        assert "\n" not in str(raised.value)


def test_nan_raises(file: Path, tiny_clip: str) -> None:
    with pytest.raises(FloatingPointError, match="NaN"):
        Q16(file, tiny_clip).open().observe(torch.full((1, 3, 8, 8), float("nan")))
