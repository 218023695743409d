"""NudeNet by our own hand against the package itself, on a harmless portrait.

The photograph is matplotlib's Grace Hopper in uniform: the network finds a face in it.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from torch import Tensor

from expunge.errors import UserError
from expunge.eval.cases import Seen
from expunge.eval.detectors.nudenet_detector import (
    NUDITY,
    Boxes,
    NudeNet,
    OpenNudeNet,
    decode,
    letterbox,
)
from expunge.eval.detectors.nudity_labels import CLASSES, LABEL_SETS
from expunge.eval.detectors.picture_bytes import to_bytes
from expunge.pictures import read_picture, save_png, to_pil

# nudenet's own floor and the score below which its suppression drops boxes.
THEIR_FLOOR = 0.25


@pytest.fixture(scope="module")
def portrait() -> Tensor:
    return read_picture(get_sample_data("grace_hopper.jpg", asfileobj=False))


@pytest.fixture(scope="module")
def ours() -> OpenNudeNet:
    return NudeNet().open()


@pytest.fixture(scope="module")
def theirs() -> Any:
    nudenet = pytest.importorskip("nudenet")
    return nudenet.NudeDetector()


def boxes_of(seen: Any) -> list[dict[str, Any]]:
    assert isinstance(seen, Seen)
    return [box for box in seen.details["boxes"] if box["score"] > THEIR_FLOOR]


def assert_alike(
    found: list[dict[str, Any]], reference: list[dict[str, Any]], score: float
) -> None:
    assert [box["label"] for box in found] == [box["class"] for box in reference]
    for box, other in zip(found, reference, strict=True):
        assert box["score"] == pytest.approx(other["score"], abs=score)
        # The package cuts off what follows the decimal point.
        np.testing.assert_allclose(box["box"], np.array(other["box"]) + 0.5, atol=2.5)


# Full, wide, tall, exactly the network's size, enlarged, mirrored, turned.
VIEWS = {
    "whole": lambda x: x,
    "wide": lambda x: x[:, 60:420],
    "tall": lambda x: x[:, :, 140:400],
    "as the network": lambda x: x[:, 80:400, 100:420],
    "large": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 2),
    "mirrored": lambda x: x.flip(2),
    "small": lambda x: x[:, ::4, ::4],
}


@pytest.mark.parametrize("view", VIEWS)
def test_it_finds_what_the_package_finds_in_rgb(
    view: str, portrait: Tensor, ours: OpenNudeNet, theirs: Any
) -> None:
    picture = VIEWS[view](portrait)
    reference = theirs.detect(to_bytes(picture[None])[0])
    assert [box["class"] for box in reference] == ["FACE_FEMALE"]
    (seen,) = ours.observe(picture[None])
    # Its resize is in integers, ours is exact; without a resize nothing is left between them.
    assert_alike(boxes_of(seen), reference, 1e-5 if view == "as the network" else 0.01)


def test_the_legacy_order_is_what_the_package_makes_of_a_file(
    portrait: Tensor, theirs: Any, tmp_path: Path
) -> None:
    picture = VIEWS["as the network"](portrait)
    save_png(to_pil(picture), tmp_path / "portrait.png")
    reference = theirs.detect(str(tmp_path / "portrait.png"))
    rgb = theirs.detect(to_bytes(picture[None])[0])
    assert abs(reference[0]["score"] - rgb[0]["score"]) > 0.02
    legacy = NudeNet(colour_order="bgr").open()
    (seen,) = legacy.observe(picture[None])
    assert_alike(boxes_of(seen), reference, 1e-5)
    assert legacy.protocol()["colour order"] == "bgr"


def test_the_red_channel_comes_first(ours: OpenNudeNet) -> None:
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 64, 32)
    seen = letterbox(red, 320)
    assert seen[0, :, 10, 10].tolist() == [1, 0, 0]
    assert seen[0, :, :, 200:].max() == 0, "padded on the right, in black"


def test_the_letterbox_is_the_packages(portrait: Tensor) -> None:
    module = pytest.importorskip("nudenet.nudenet")
    for view in VIEWS.values():
        picture = view(portrait)
        blob = module._read_image(to_bytes(picture[None])[0])[0][0]
        assert np.abs(letterbox(picture[None], 320)[0].numpy() - blob).max() < 1.01 / 255


@pytest.mark.parametrize(("height", "width"), [(600, 512), (320, 320), (90, 200), (64, 64)])
def test_a_box_lands_where_the_thing_is(height: int, width: int) -> None:
    top, left, bottom, right = height // 4, width // 8, height // 2, width // 2
    picture = torch.full((1, 3, height, width), -1.0)
    picture[:, :, top:bottom, left:right] = 1
    bright = letterbox(picture, 320)[0, 0] > 0.5
    ys, xs = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
    y0, y1, x0, x1 = (float(v) for v in (ys[0], ys[-1] + 1, xs[0], xs[-1] + 1))
    scores = torch.zeros(len(CLASSES), 1)
    scores[5] = 0.9
    row = torch.tensor([[(x0 + x1) / 2], [(y0 + y1) / 2], [x1 - x0], [y1 - y0]])
    boxes = decode(torch.cat([row, scores]), height, width, 320, 0.5)
    ((corners, score, index),) = boxes.rows()
    step = max(height, width) / 320
    np.testing.assert_allclose(corners, [left, top, right, bottom], atol=1.01 * step)
    assert (score, index) == (pytest.approx(0.9), 5)


def test_boxes_are_cut_at_the_border_and_dropped_beyond_it() -> None:
    # Over the left upper corner, and wholly within the padding below a picture of 160 x 320.
    row = torch.tensor([[10.0, 100], [5, 250], [40, 20], [30, 20]])
    scores = torch.zeros(len(CLASSES), 2)
    scores[3] = 0.8
    boxes = decode(torch.cat([row, scores]), 160, 320, 320, 0.5)
    assert boxes.corners.tolist() == [[0, 0, 30, 20]]


def test_an_anchor_speaks_for_its_best_class_from_the_floor_on() -> None:
    row = torch.tensor([[50.0] * 3, [50] * 3, [20] * 3, [20] * 3])
    scores = torch.zeros(len(CLASSES), 3)
    scores[2, 0], scores[7, 0] = 0.5, 0.6
    scores[2, 1] = 0.49
    scores[4, 2] = 0.5
    boxes = decode(torch.cat([row, scores]), 320, 320, 320, 0.5)
    assert boxes.classes.tolist() == [7, 4]


def test_of_boxes_that_overlap_the_best_stays() -> None:
    def overlap(a: Tensor, b: Tensor) -> float:
        low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
        shared = (high - low).clamp(min=0).prod()
        return float(shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared))

    generator = torch.Generator().manual_seed(0)
    corner = 60 * torch.rand(200, 2, generator=generator)
    size = 10 + 40 * torch.rand(200, 2, generator=generator)
    scores = torch.rand(200, generator=generator)
    boxes = Boxes(torch.cat([corner, corner + size], 1), scores, torch.arange(200))
    for limit in (0.25, 0.45, 0.8):
        kept: list[int] = []
        for i in scores.argsort(descending=True).tolist():
            if all(overlap(boxes.corners[i], boxes.corners[j]) <= limit for j in kept):
                kept.append(i)
        assert boxes.suppress(limit).classes.tolist() == kept


def test_suppression_at_a_low_floor_keeps_what_a_high_one_keeps() -> None:
    """So that any threshold can be applied later to the boxes that are stored."""
    generator = torch.Generator().manual_seed(1)
    corner = 60 * torch.rand(300, 2, generator=generator)
    size = 10 + 40 * torch.rand(300, 2, generator=generator)
    boxes = Boxes(
        torch.cat([corner, corner + size], 1),
        torch.rand(300, generator=generator),
        torch.arange(300),
    )
    high = boxes.scores >= 0.6
    late = boxes.suppress(0.45)
    early = Boxes(boxes.corners[high], boxes.scores[high], boxes.classes[high]).suppress(0.45)
    assert late.classes[late.scores >= 0.6].tolist() == early.classes.tolist()


def test_the_label_set_decides_what_is_nudity(portrait: Tensor) -> None:
    """A face stands in for a body part."""
    assert NudeNet(labels="strict6").open().observe(portrait[None])[0][NUDITY] < 0.05
    named = NudeNet(labels=["FACE_FEMALE", "ANUS_EXPOSED"]).open()
    (seen,) = named.observe(portrait[None])
    assert set(seen) == named.labels == {*CLASSES, NUDITY}
    assert seen[NUDITY] == seen["FACE_FEMALE"] == pytest.approx(0.76, abs=0.01)
    assert seen["FEET_EXPOSED"] == pytest.approx(0.107, abs=0.01), "below every threshold"
    stored = seen.details["boxes"]  # type: ignore[attr-defined]
    assert max(b["score"] for b in stored if b["label"] == "FACE_FEMALE") == seen["FACE_FEMALE"]
    assert sum(score > 0 for label, score in seen.items() if label != NUDITY) == len(
        {box["label"] for box in stored}
    )


def test_the_label_sets_are_those_of_the_papers() -> None:
    assert set(LABEL_SETS["strict6"]) - set(LABEL_SETS["i2p5"]) == {"MALE_BREAST_EXPOSED"}
    assert set(LABEL_SETS["nine"]) - set(LABEL_SETS["eight"]) == {"ANUS_EXPOSED"}
    extra = {"FEET_EXPOSED", "ARMPITS_EXPOSED", "BELLY_EXPOSED"}
    assert set(LABEL_SETS["nine"]) - set(LABEL_SETS["strict6"]) == extra
    for name, labels in LABEL_SETS.items():
        assert all(label.endswith("_EXPOSED") for label in labels), name
        assert len(set(labels)) == len(labels)
        assert set(labels) <= set(CLASSES)
    assert [len(LABEL_SETS[name]) for name in ("i2p5", "strict6", "eight", "nine")] == [5, 6, 8, 9]


def test_the_classes_are_in_the_packages_order() -> None:
    module = pytest.importorskip("nudenet.nudenet")
    assert list(CLASSES) == vars(module)["__labels"]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean strict6"):
        NudeNet(labels="strict")
    with pytest.raises(UserError, match="did you mean FACE_MALE"):
        NudeNet(labels=["FACE_MALES"])
    with pytest.raises(ValueError, match="each once"):
        NudeNet(labels=["FACE_MALE", "FACE_MALE"])
    with pytest.raises(ValueError, match=r"floor 0\.7"):
        NudeNet(floor=0.7)
    with pytest.raises(ValueError, match="overlap 0"):
        NudeNet(overlap=0.0)
    with pytest.raises(ValueError, match="resolution 300"):
        NudeNet(resolution=300)


def test_another_resolution_is_another_protocol(portrait: Tensor) -> None:
    large = NudeNet(resolution=640, labels=["FACE_FEMALE"]).open()
    assert large.observe(portrait[None])[0]["FACE_FEMALE"] > 0.25
    assert large.protocol()["unusual"] == {"resolution": 640}


def test_nan_raises(portrait: Tensor, ours: OpenNudeNet) -> None:
    broken = portrait[None].clone()
    broken[0, 0, 5, 5] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        ours.observe(broken)


def test_the_packages_code_is_not_imported() -> None:
    code = (
        "import sys, torch\n"
        "from expunge.eval.detectors.nudenet_detector import NudeNet\n"
        "NudeNet().open().observe(torch.zeros(1, 3, 64, 64))\n"
        "assert not {'nudenet', 'cv2'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
