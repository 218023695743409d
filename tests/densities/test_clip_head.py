"""Heads learn from a few pictures, are kept safely, and fit only the CLIP they were made with."""

import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge.clip import load_clip
from expunge.densities.clip_head import ClipHead, read_head
from expunge.densities.head_training import auc, fit, train_head
from expunge.errors import UserError


@pytest.fixture
def labelled(folder_of, tmp_path: Path) -> Path:
    folder_of("labelled/harmful", "red", 12)
    folder_of("labelled/benign", "blue", 18, seed=1)
    return tmp_path / "labelled"


@pytest.mark.parametrize("hidden", [0, 8])
def test_it_trains_on_a_few_pictures_in_seconds(
    hidden: int, labelled: Path, tiny_clip: str, drawn, tmp_path: Path
) -> None:
    begun = time.perf_counter()
    report = train_head(labelled, tmp_path / "h.safetensors", tiny_clip, hidden=hidden)
    assert time.perf_counter() - begun < 60
    assert (report.harmful, report.benign, report.folds) == (12, 18, 5)
    assert report.accuracy > 0.9
    assert report.auc > 0.95
    density = ClipHead(str(tmp_path / "h.safetensors")).build()
    assert list(density.names) == ["labelled"]
    red, blue = density(drawn("red", 20, 7)), density(drawn("blue", 20, 8))
    assert red.exceeds(0.5).float().mean() > 0.9
    assert blue.exceeds(0.5).float().mean() < 0.1
    assert 0 < blue.score.min() < red.score.max() < 1


def test_it_repeats_and_its_seed_matters(labelled: Path, tiny_clip: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        train_head(labelled, file, tiny_clip, hidden=4, steps=20, seed=seed)
    first, again, other = (load_file(file)["weight"] for file in files)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    about = json.loads(read_metadata(files[0]))
    assert about["classes"] == ["benign", "harmful"]
    assert about["sha256"] == load_clip(tiny_clip).sha256
    assert 0 <= about["held_out"]["auc"] <= 1


def read_metadata(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        return stored.metadata()["expunge"]


def test_labels_without_a_difference_are_at_chance(folder_of, tiny_clip, tmp_path: Path) -> None:
    """What cross-validation is for: a head that has learnt the pictures by heart."""
    folder_of("noise/harmful", "grey", 20, seed=1)
    folder_of("noise/benign", "grey", 20, seed=2)
    report = train_head(tmp_path / "noise", tmp_path / "h.safetensors", tiny_clip, hidden=16)
    assert 0.2 < report.auc < 0.8


def test_the_linear_head_is_at_the_minimum_of_its_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(30, 5, generator=generator) + 0.5, dim=1)
    truth = torch.arange(30) % 3 == 0
    found = fit(features, truth, 0, 0.1, 2000, 0)
    mean = features.mean(0)
    scale = (features - mean).square().mean().sqrt()
    w = (found["weight"][0] * scale).double()
    b = (found["bias"] + found["weight"] @ mean)[0].double()
    x = ((features - mean) / scale).double()
    w, b = w.requires_grad_(), b.detach().requires_grad_()
    p = torch.sigmoid(x @ w + b)
    loss = -(p[truth].log().mean() + (1 - p[~truth]).log().mean()) / 2 + 0.05 * w.square().sum()
    gradient = torch.autograd.grad(loss, [w, b])
    assert max(g.abs().max() for g in gradient) < 1e-3


def test_auc_counts_pairs() -> None:
    assert auc([1.0, 2.0, 3.0, 4.0], [False, False, True, True]) == 1
    assert auc([1.0, 2.0, 2.0, 0.0], [True, False, True, False]) == pytest.approx(2.5 / 4)


def test_gradient_agrees_with_finite_differences(
    labelled: Path, tiny_clip: str, drawn, tmp_path: Path
) -> None:
    train_head(labelled, tmp_path / "h.safetensors", tiny_clip, hidden=4, steps=20)
    density = ClipHead(str(tmp_path / "h.safetensors")).build()
    density.clip.model.double()
    x = drawn("red", 1).double().requires_grad_()
    density.per_concept(x).sum().backward()
    step = torch.randn(x.shape, dtype=torch.float64, generator=torch.manual_seed(3)) * 1e-6
    with torch.no_grad():
        change = (density.per_concept(x + step) - density.per_concept(x - step)).sum() / 2
    assert change.item() == pytest.approx((x.grad * step).sum().item(), rel=1e-4)


def test_q16_is_a_softmax_over_two_prompts(tiny_clip: str, drawn, tmp_path: Path) -> None:
    prompts = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "q16.npy", prompts.numpy())
    save_file({"prompts_16": prompts}, tmp_path / "q16.safetensors")
    seen = load_clip(tiny_clip).encode_images(drawn("blue", 3))
    unit = torch.nn.functional.normalize(prompts, dim=1)
    expected = (100 * seen @ unit.T).softmax(1)[:, 1]
    for name in ("q16.npy", "q16.safetensors"):
        density = ClipHead(str(tmp_path / name), tiny_clip).build()
        torch.testing.assert_close(density(drawn("blue", 3)).score, expected, rtol=1e-4, atol=1e-6)
        with pytest.raises(UserError, match="names no CLIP"):
            ClipHead(str(tmp_path / name)).build()


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    for suffix in (".p", ".pkl", ".pt", ".bin"):
        file = tmp_path / f"prompts{suffix}"
        file.write_bytes(pickle.dumps(np.zeros((2, 4))))
        with pytest.raises(UserError, match="a pickle, which could run any code"):
            read_head(file)
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_head(tmp_path / "objects.npy")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompts": torch.zeros(3, 4)}, r"with prompts \(3, 4\)"),
        ({"weight": torch.zeros(1, 4)}, r"with weight \(1, 4\)"),
        ({"weight": torch.zeros(1, 4), "bias": torch.zeros(2)}, "with bias"),
        ({"weight": torch.full((1, 4), torch.nan), "bias": torch.zeros(1)}, "holds NaN"),
    ],
)
def test_a_file_of_something_else_is_one_line(tensors: dict, message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "h.safetensors")
    with pytest.raises(UserError, match=message):
        read_head(tmp_path / "h.safetensors")


def test_a_head_of_another_width_or_another_clip_is_one_line(
    labelled: Path, tiny_clip: str, tmp_path: Path
) -> None:
    narrow = {"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}
    save_file(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match=r"of width 8 for CLIP .* of width 16") as error:
        ClipHead(str(tmp_path / "narrow.safetensors"), tiny_clip).build()
    assert "\n" not in str(error.value)
    file = tmp_path / "h.safetensors"
    train_head(labelled, file, tiny_clip, steps=1)
    metadata = json.loads(read_metadata(file)) | {"sha256": "0" * 64}
    save_file(load_file(file), file, metadata={"expunge": json.dumps(metadata)})
    with pytest.raises(UserError, match="trained on other weights"):
        ClipHead(str(file)).build()


def test_training_refuses_what_it_cannot_use(labelled: Path, tiny_clip: str, tmp_path) -> None:
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        train_head(labelled, tmp_path / "h.pt", tiny_clip)
    (tmp_path / "h.safetensors").write_text("mine")
    with pytest.raises(UserError, match="which exists"):
        train_head(labelled, tmp_path / "h.safetensors", tiny_clip)
    assert (tmp_path / "h.safetensors").read_text() == "mine"
    for picture in sorted((labelled / "harmful").iterdir())[1:]:
        picture.unlink()
    with pytest.raises(UserError, match="got 1 harmful and 18 benign"):
        train_head(labelled, tmp_path / "new.safetensors", tiny_clip)
    with pytest.raises(UserError, match="which is no folder"):
        train_head(tmp_path, tmp_path / "new.safetensors", tiny_clip)
