"""One contract for every row of the table of detectors, and the ids that tell judges apart."""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from expunge.configuration import dump, load
from expunge.densities.base import clips_of
from expunge.eval.detectors import DETECTORS, Detector, OpenDetector, finite, label_set, protocol_id

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Holder:
    """A configuration that has a detector."""

    detector: Annotated[Detector, DETECTORS]


def brightness(images: Tensor) -> Tensor:
    return torch.stack([images[:, 0], images.mean(1)], 1).mean((2, 3)) / 2 + 0.5


def darkness(images: Tensor) -> Tensor:
    return 1 - brightness(images)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads, vectors and a classifier, all with random weights."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "other"):
        save_file(
            {"prompts": torch.randn(2, 16, generator=generator)}, folder / f"q16-{name}.safetensors"
        )
        save_file(nn.Linear(16, 1).state_dict(), folder / f"head-{name}.safetensors")
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            image_size=32, patch_size=8, id2label={0: "cat", 1: "bomb"},
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(folder / f"vit-{name}")
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / f"vit-{name}")
    return folder


@pytest.fixture
def rows(
    files: Path, tiny_clip: str, judge_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Row -> settings of every kind, and another value for each setting that changes answers."""
    monkeypatch.setitem(sys.modules, "own_density", sys.modules[__name__])
    density = {"type": "callable", "function": "own_density:brightness", "names": ["red", "light"]}
    texts = {"bomb": ["a bomb"], "cat": ["a cat face"]}
    return {
        "emoji_judge": ({"folder": str(judge_folder)}, {"threshold": 0.7}),
        "density": (
            {"density": density},
            {
                "density": {**density, "threshold": 0.7},
                "density ": {**density, "threshold": [0.5, 0.7]},
                "density  ": {**density, "threshold": [0.7, 0.5]},
                "density   ": {**density, "function": "own_density:darkness"},
            },
        ),
        "nudenet": (
            {},
            {
                "labels": "nine", "labels ": ["FACE_MALE"], "threshold": 0.5, "colour_order": "bgr",
                "resolution": 640, "overlap": 0.5,
            },
        ),
        "open_nsfw": ({}, {"threshold": 0.2}),
        "q16": (
            {"prompts": str(files / "q16-one.safetensors"), "clip": tiny_clip},
            {"threshold": 0.9, "prompts": str(files / "q16-other.safetensors")},
        ),
        "clip_heads": (
            {"heads": {"odd": str(files / "head-one.safetensors")}, "clip": tiny_clip},
            {
                "heads": {"odd": str(files / "head-other.safetensors")},
                "heads ": {"even": str(files / "head-one.safetensors")},
                "unit_length": True, "threshold": 0.6,
            },
        ),
        "zero_shot_clip": (
            {"labels": texts, "clip": tiny_clip},
            {
                "labels": {**texts, "pizza": ["a pizza"]},
                "labels ": {**texts, "cat": ["a cat"]}, "threshold": 0.6,
            },
        ),
        "classifier": (
            {"model": str(files / "vit-one")},
            {"model": str(files / "vit-other"), "scores": "sigmoid", "threshold": 0.6},
        ),
    }  # fmt: skip


@pytest.fixture
def opened(
    tmp_path: Path, rows: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> Callable[..., tuple[Detector, OpenDetector]]:
    """Write a row's settings as a user would, read and open them."""

    def read(name: str, **changed: Any) -> tuple[Detector, OpenDetector]:
        settings = {"type": name, **rows[name][0], **changed}
        (tmp_path / "x.yaml").write_text(yaml.safe_dump({"detector": settings}))
        detector = load(Holder, tmp_path / "x.yaml").detector
        return detector, detector.open()

    return read


def pictures(height: int, width: int) -> Tensor:
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", DETECTORS.names())
def test_a_row_keeps_the_contract(name: str, opened: Any, tmp_path: Path) -> None:
    settings, detector = opened(name)
    (tmp_path / "again.yaml").write_text(dump(Holder(settings)))
    assert load(Holder, tmp_path / "again.yaml").detector == settings
    assert all(f.metadata.get("help") for f in dataclasses.fields(settings))
    protocol = detector.protocol()
    assert json.loads(json.dumps(protocol, allow_nan=False)) == protocol
    assert protocol["detector"] == name
    assert len(protocol["weights"]) == 64
    for height, width in ((64, 64), (48, 80), (33, 20)):
        images = pictures(height, width)
        together = detector.observe(images)
        assert len(together) == 3
        for image, seen in zip(images, together, strict=True):
            assert set(seen) == detector.labels
            assert all(0 <= score <= 1 for score in seen.values())
            (alone,) = detector.observe(image[None])
            assert dict(alone) == pytest.approx(dict(seen), abs=1e-5), "whatever it is seen with"
    assert detector.protocol() == protocol


@pytest.mark.parametrize("name", DETECTORS.names())
def test_nan_is_never_an_answer(name: str, opened: Any) -> None:
    images = pictures(64, 64)
    images[1] = float("nan")
    with pytest.raises(FloatingPointError):
        opened(name)[1].observe(images)


@pytest.mark.parametrize("name", DETECTORS.names())
def test_every_setting_that_changes_answers_changes_the_id(
    name: str, opened: Any, rows: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    settings, detector = opened(name)
    ids = [protocol_id(detector.protocol()), protocol_id(opened(name)[1].protocol())]
    assert ids[0] == ids[1]
    for key, value in rows[name][1].items():
        ids.append(protocol_id(opened(name, **{key.strip(): value})[1].protocol()))
    ids.append(protocol_id(detector.protocol() | {"version": 2}))
    assert len(set(ids)) == len(ids) - 1, ids
    assert all(" " not in found for found in ids)
    # These decide where it runs, what is kept beside the answers, or whose weights are hashed.
    other = {"device", "floor", "weights", "clip", "folder", "revision"}
    tried = {key.strip() for key in rows[name][1]}
    assert {f.name for f in dataclasses.fields(settings)} - other == tried


@pytest.mark.parametrize("name", DETECTORS.names())
def test_its_protocol_names_every_clip_that_it_sees_through(
    name: str, opened: Any, loaded_clips: list[Any]
) -> None:
    _, detector = opened(name)
    assert set(clips_of(detector.protocol())) == {clip.eye for clip in loaded_clips}
    assert bool(loaded_clips) == (name in ("q16", "clip_heads", "zero_shot_clip"))


def test_a_density_of_several_parts_names_the_clips_of_all(
    opened: Any, tiny_clip: str, loaded_clips: list[Any]
) -> None:
    text = {"type": "clip_text", "clip": tiny_clip, "targets": ["a bomb"], "threshold": 0.2}
    other = {"type": "callable", "function": "own_density:brightness", "names": ["red", "light"]}
    _, detector = opened("density", density={"type": "combination", "densities": [other, text]})
    assert list(clips_of(detector.protocol())) == [clip.eye for clip in loaded_clips] != []


@pytest.mark.parametrize("name", DETECTORS.names())
def test_a_row_is_documented(name: str) -> None:
    text = (ROOT / "docs" / "detectors.md").read_text(encoding="utf-8")
    assert f"\n## {name}\n" in text
    section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
    for f in dataclasses.fields(DETECTORS.load(name)):
        assert f"`{f.name}`" in section, f.name


def test_the_id_of_nudenet() -> None:
    from expunge.eval.detectors.nudenet_detector import NudeNet

    assert protocol_id(NudeNet().open().protocol()) == (
        "nudenet-320n@c15d8273:version=1:strict6>=0.6:rgb"
    )
    other = NudeNet(labels=["FACE_MALE"], threshold=0.45, overlap=0.5, colour_order="bgr")
    assert (
        protocol_id(other.open().protocol())
        == "nudenet-320n@c15d8273:version=1:FACE_MALE>=0.45:bgr:overlap=0.5"
    )


def test_the_id_of_a_density_shows_its_threshold(opened: Any) -> None:
    density = {"type": "callable", "function": "own_density:brightness", "names": ["red", "light"]}
    _, detector = opened("density", density={**density, "threshold": 0.23})
    assert protocol_id(detector.protocol()).startswith("callable@")
    assert protocol_id(detector.protocol()).endswith(":light+red>=0.23"), "not 0.23000000417"


def test_the_safety_checker_is_a_density(opened: Any) -> None:
    """The bundled filter has the layout of Stable Diffusion's: a threshold for each concept."""
    _, detector = opened("density", density={"type": "sd_filter"})
    found = detector.observe(pictures(64, 64))
    assert len(detector.labels) > 1
    assert all(set(seen) == detector.labels and set(seen.values()) <= {0, 1} for seen in found)
    assert ">=own" in protocol_id(detector.protocol())


def test_many_labels_are_a_number_and_a_hash() -> None:
    many = [f"label number {i}" for i in range(20)]
    assert label_set(many).startswith("20 labels~")
    assert label_set(many) == label_set(reversed(many)) != label_set([*many[1:], "x"])
    assert label_set(["b", "a"]) == "a+b"
    assert label_set(["a", "b"], {"a": ["x"]}) != label_set(["a", "b"], {"a": ["y"]})


def test_scores_of_which_nothing_can_be_said_raise() -> None:
    assert finite({"a": 0.0}) == {"a": 0.0}
    for score in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match="for b"):
            finite({"a": 0.5, "b": score})


@pytest.mark.parametrize("threshold", [0.0, 1.01])
@pytest.mark.parametrize("name", DETECTORS.names())
def test_a_threshold_that_sees_everything_or_nothing_is_refused(
    name: str, opened: Any, threshold: float
) -> None:
    # That of a density's label, which scores 0 or 1, is no setting.
    said = "unknown key" if name == "density" else r"allowed: a number in \(0, 1\]"
    with pytest.raises(ValueError, match=said):
        opened(name, threshold=threshold)


def test_the_suite_of_the_docs_has_two_judges(tmp_path: Path) -> None:
    import re

    from expunge.eval.suite import load_suite

    text = (ROOT / "docs" / "detectors.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.S | re.M)
    (tmp_path / "nudity.yaml").write_text(block)
    suite = load_suite(str(tmp_path / "nudity.yaml"))
    detector, judge = suite.detector.open(), suite.judges["whole"].detector.open()
    assert set(suite.judges["whole"].asks) == set(suite.metrics) == set(suite.prompts.asks)  # type: ignore[attr-defined]
    assert set(suite.prompts.asks["nude"]) <= detector.labels  # type: ignore[attr-defined]
    assert set(suite.judges["whole"].asks["nude"]) <= judge.labels
    assert protocol_id(detector.protocol()) != protocol_id(judge.protocol())
