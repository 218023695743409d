"""Feature extractors: the real networks with random weights, and what is said without them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from expunge.backbones import bundled
from expunge.errors import UserError
from expunge.eval.checkpoints import read_tensors
from expunge.eval.detectors.emoji_judge import load_judge
from expunge.eval.features import FEATURES, extract
from expunge.eval.features.dinov2 import DinoV2Features
from expunge.eval.features.emoji_judge import EmojiJudgeFeatures
from expunge.eval.features.inception import InceptionFeatures


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    return pixels / 127.5 - 1


def test_emoji_judge_is_the_bundled_judges_trunk(images: torch.Tensor) -> None:
    opened = EmojiJudgeFeatures().open()
    judge, _ = load_judge(bundled("emoji") / "judge")
    assert torch.equal(opened.features(images), judge.features(images))
    large = F.interpolate(images, scale_factor=2, mode="nearest")
    assert torch.allclose(opened.features(large), judge.features(images), atol=1e-5)
    assert opened.protocol()["width"] == opened.features(images).shape[1]


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A file of random weights of torch-fidelity's Inception, and the network that it is of."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    # The library builds a network only from a file; one of its own makes the names and shapes.
    blank = object.__new__(library.FeatureExtractorInceptionV3)
    states: dict[str, torch.Tensor] = {}
    original = torch.load
    try:
        torch.load = lambda *_, **__: (_ for _ in ()).throw(_Stop)  # type: ignore[assignment]
        blank.__init__("x", ["2048"], feature_extractor_weights_path="none")
    except _Stop:
        states = blank.state_dict()
    finally:
        torch.load = original
    file = folder / "weights.pth"
    torch.save(states, file)
    return file, library.FeatureExtractorInceptionV3(
        "x", ["2048"], feature_extractor_weights_path=str(file)
    )


class _Stop(Exception):
    pass


def test_inception_is_torch_fidelitys_on_the_same_bytes(inception: Any, images: Any) -> None:
    file, theirs = inception
    opened = InceptionFeatures(weights=file, device="cpu").open()
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        (want,) = theirs(pixels)
    found = extract(opened, images)
    assert found.shape == (2, 2048)
    assert torch.equal(torch.from_numpy(found), want)
    assert opened.protocol()["width"] == 2048


def test_inception_is_taken_from_torchs_folder_of_downloads(
    inception: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "weights-inception-2015-12-05-6726825d.pth").symlink_to(inception[0])
    told = InceptionFeatures(device="cpu").open().protocol()
    assert told == InceptionFeatures(weights=inception[0], device="cpu").open().protocol()


def test_inception_without_weights_or_with_others_is_one_line(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    for file, says in (("none.pth", "no weights of Inception V3 at"), ("other.pth", "do not fit")):
        with pytest.raises(UserError, match=says) as error:
            InceptionFeatures(weights=tmp_path / file).open()
        assert "https://github.com/toshas/torch-fidelity" in str(error.value)
        assert "\n" not in str(error.value)


def test_code_in_a_file_of_weights_is_not_run(tmp_path: Path) -> None:
    torch.save({"fc.weight": _Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="cannot be read"):
        InceptionFeatures(weights=tmp_path / "trap.pth").open()
    assert not (tmp_path / "sprung").exists()


class _Trap:
    """What a pickle can do: touch a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=224,
            patch_size=56, mlp_ratio=2,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(folder)
    return str(folder), model


def test_dinov2_is_the_class_token_after_the_last_norm(dinov2: Any, images: Any) -> None:
    from PIL import Image
    from transformers import BitImageProcessorPil

    folder, model = dinov2
    opened = DinoV2Features(model=folder, device="cpu").open()
    # transformers' own preparation, from bytes.
    arrays = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    prepare = BitImageProcessorPil(
        size={"height": 224, "width": 224}, do_center_crop=False, resample=Image.Resampling.BICUBIC,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    pixels = prepare([Image.fromarray(a) for a in arrays], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        want = model(pixel_values=pixels).last_hidden_state[:, 0]
    found = opened.features(images)
    assert found.shape == (2, 24)
    # Pillow rounds to bytes after its resize.
    assert (found - want).abs().max() < 0.05 * want.std()
    assert opened.protocol()["width"] == 24


def test_dinov2_without_weights_is_one_line(dinov2: Any, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match="DINOv2 facebook/dinov2-large, which cannot") as error:
        DinoV2Features().open()
    assert "\n" not in str(error.value)
    shutil.copytree(dinov2[0], tmp_path / "partial")
    file = tmp_path / "partial" / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "layernorm" not in k}, file)
    with pytest.raises(UserError, match="without the weights layernorm"):
        DinoV2Features(model=str(tmp_path / "partial")).open()


def test_features_that_are_nan_or_too_few_raise() -> None:
    class Broken:
        def __init__(self, found: torch.Tensor) -> None:
            self.found = found

        def protocol(self) -> dict[str, Any]:
            return {}

        def features(self, images: torch.Tensor) -> torch.Tensor:
            return self.found

    pictures = torch.zeros(2, 3, 8, 8)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError):
            extract(Broken(torch.tensor([[1.0, 2.0], [3.0, bad]])), pictures)
    for shape in ((1, 4), (2,), (2, 3, 4)):
        with pytest.raises(ValueError, match="of 2 pictures"):
            extract(Broken(torch.zeros(shape)), pictures)


def test_every_row_says_what_it_is() -> None:
    for name in FEATURES:
        assert (FEATURES.load(name).__doc__ or "").count(".") > 0


def test_a_list_is_no_file_of_named_tensors(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no named tensors"):
        read_tensors(tmp_path / "list.pt", "thing", "nowhere")
