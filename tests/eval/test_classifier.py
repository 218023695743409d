"""Any image classifier of transformers: its own scores under its own names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from expunge.errors import UserError
from expunge.eval.detectors.classifier import Classifier
from expunge.pictures import to_pil

NAMES = ["crane", "cat", "bomb", "crane"]


def config(**more: Any) -> ViTConfig:
    return ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8, id2label=dict(enumerate(NAMES)), **more,
    )  # fmt: skip


def save(folder: Path, model: torch.nn.Module) -> Path:
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.4)
    model.save_pretrained(folder)  # type: ignore[operator]
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("model"), ViTForImageClassification(config()))


def pictures(n: int = 4) -> Tensor:
    return torch.rand(n, 3, 40, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1


def logits(folder: Path, images: Tensor) -> Tensor:
    reference = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        inputs = processor(images=[to_pil(x) for x in images], return_tensors="pt")
        found: Tensor = reference(**inputs).logits
    return found


def test_scores_are_the_models_own(model: Path, tmp_path: Path) -> None:
    images = pictures(8)
    even = ViTForImageClassification.from_pretrained(model)
    cranes = logits(model, images)[:, [0, 3]]
    # Now one of the namesakes is the greater, now the other.
    even.classifier.bias.data[3] += (cranes[:, 0] - cranes[:, 1]).median()
    even.save_pretrained(tmp_path)
    ViTImageProcessor.from_pretrained(model).save_pretrained(tmp_path)
    expected = logits(tmp_path, images).softmax(1)
    detector = Classifier(str(tmp_path)).open()
    assert detector.labels == {"crane", "cat", "bomb"}
    for seen, row in zip(detector.observe(images), expected.tolist(), strict=True):
        assert seen["cat"] == pytest.approx(row[1], abs=1e-6)
        assert seen["bomb"] == pytest.approx(row[2], abs=1e-6)
        assert seen["crane"] == pytest.approx(max(row[0], row[3]), abs=1e-6), "of namesakes"
    assert len(set((expected[:, 0] > expected[:, 3]).tolist())) == 2


@pytest.mark.parametrize("how", ["the model", "the settings"])
def test_several_labels_at_a_time_are_sigmoids(how: str, model: Path, tmp_path: Path) -> None:
    folder, scores = model, "sigmoid"
    if how == "the model":
        many = ViTForImageClassification(config(problem_type="multi_label_classification"))
        folder, scores = save(tmp_path, many), None
    expected = logits(folder, pictures()).sigmoid()
    found = Classifier(str(folder), scores=scores).open().observe(pictures())  # type: ignore[arg-type]
    torch.testing.assert_close(torch.tensor([seen["cat"] for seen in found]), expected[:, 1])


def test_a_head_that_is_not_in_the_file_is_refused(tmp_path: Path) -> None:
    """transformers would make one of random numbers, and warn."""
    save(tmp_path, ViTModel(config(), add_pooling_layer=False))
    with pytest.raises(UserError, match=r"without 2 of its weights \(classifier\.bias"):
        Classifier(str(tmp_path)).open()


def test_what_is_missing_is_one_line(model: Path, tmp_path: Path) -> None:
    regression = tmp_path / "regression"
    save(regression, ViTForImageClassification(config(problem_type="regression")))
    bare = tmp_path / "bare"
    ViTForImageClassification(config()).save_pretrained(bare)
    broken = tmp_path / "broken"
    save(broken, ViTForImageClassification(config()))
    (broken / "model.safetensors").write_bytes(b"no tensors")
    pickled = tmp_path / "pickled"
    save(pickled, ViTForImageClassification(config()))
    (pickled / "model.safetensors").unlink()
    torch.save(ViTForImageClassification(config()).state_dict(), pickled / "pytorch_model.bin")
    for folder in (tmp_path / "none", bare, broken, pickled, regression):
        with pytest.raises(UserError, match="got classifier") as raised:
            Classifier(str(folder)).open()
        assert "\n" not in str(raised.value)


def test_the_hash_is_of_weights_preprocessing_and_configuration(
    model: Path, tmp_path: Path
) -> None:
    def weights(folder: Path) -> str:
        found: str = Classifier(str(folder)).open().protocol()["weights"]
        return found

    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "copy": ("config.json", {}),
        "bright": ("preprocessor_config.json", {"image_mean": [0.1] * 3}),
        "renamed": ("config.json", {"id2label": dict(enumerate(reversed(NAMES)))}),
        "relu": ("config.json", {"hidden_act": "relu"}),
    }
    for name, (changed, values) in changes.items():
        (tmp_path / name).mkdir()
        for file in model.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        settings = tmp_path / name / changed
        settings.write_text(json.dumps(json.loads(settings.read_text()) | values))
    save(tmp_path / "other", ViTForImageClassification(config()))
    assert weights(model) == weights(tmp_path / "copy")
    different = [model, *(tmp_path / name for name in ("bright", "renamed", "relu", "other"))]
    assert len(set(map(weights, different))) == len(different)


def test_nan_raises(model: Path, tmp_path: Path) -> None:
    detector = Classifier(str(model)).open()
    with pytest.raises(FloatingPointError, match="NaN"):
        detector.observe(pictures() * float("nan"))
    broken = ViTForImageClassification(config())
    save(tmp_path, broken)
    broken.classifier.bias.data[1] = float("nan")
    broken.save_pretrained(tmp_path)
    with pytest.raises(FloatingPointError, match="NaN"):
        Classifier(str(tmp_path)).open().observe(pictures())
