"""LPIPS and the pixel distance to the base's picture of the same prompt and seed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from expunge.errors import UserError
from expunge.eval.metrics import Batch
from expunge.eval.metrics.perceptual import Perceptual, load_lpips
from expunge.eval.metrics.pixel_distance import PixelDistance
from picture_metrics import cases_of, measured


def pictures(n: int, seed: int, side: int = 64) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights as torchvision saves them."""
    from torchvision import models

    folder = tmp_path_factory.mktemp("backbones")
    found = {}
    for net, make in (("alex", models.alexnet), ("squeeze", models.squeezenet1_1)):
        torch.manual_seed(4)
        found[net] = folder / f"{net}.pth"
        # The classifier plays no part, and is most of the bytes.
        weights = make(weights=None).state_dict()
        torch.save({k: v for k, v in weights.items() if k.startswith("features")}, found[net])
    return found


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_is_the_packages_own_with_its_linear_heads(backbones: Any, net: Any) -> None:
    import lpips
    from torchvision import models

    x, y = pictures(4, 0), pictures(4, 1)
    found = measured(
        Perceptual(net=net, backbone_weights=backbones[net], device="cpu"), cases_of(4), x, y
    )
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    make = models.alexnet if net == "alex" else models.squeezenet1_1
    backbone = make(weights=None).eval()
    backbone.load_state_dict(torch.load(backbones[net]), strict=False)
    # Layer by layer the library's slices are torchvision's features, so that only they can differ.
    at = 0
    for i in range(1, theirs.net.N_slices + 1):
        part = getattr(theirs.net, f"slice{i}")
        for layer in part:
            layer.load_state_dict(backbone.features[at].state_dict())
            at += 1
    with torch.no_grad():
        want = theirs(x, y).flatten()
    assert want.min() > 0
    assert found.value == pytest.approx(want.mean().item(), rel=1e-5)
    assert found.low < found.value < found.high
    assert not found.higher_is_better


def test_the_linear_heads_are_those_of_the_wheel(backbones: Any) -> None:
    import lpips

    file = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"
    ours = load_lpips("alex", backbones["alex"]).state_dict()
    heads = torch.load(file, map_location="cpu", weights_only=True)
    assert heads
    assert all(torch.equal(ours[name], value) for name, value in heads.items())


def test_loading_lpips_moves_nobodys_random_numbers(backbones: Any) -> None:
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    load_lpips("alex", backbones["alex"])
    assert torch.equal(torch.rand(3), want)


def test_lpips_takes_the_backbone_from_torchs_folder_of_downloads(
    backbones: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "alexnet-owt-7be5be79.pth").symlink_to(backbones["alex"])
    here = Perceptual(device="cpu").open().protocol()
    assert here == Perceptual(backbone_weights=backbones["alex"], device="cpu").open().protocol()


def test_lpips_without_its_backbone_is_one_line(backbones: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no weights of AlexNet at .*download.pytorch.org"
    ) as error:
        Perceptual(backbone_weights=tmp_path / "none.pth").open()
    assert "\n" not in str(error.value)
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"without features.0.bias; allowed: weights of SqueezeNet"):
        Perceptual(net="squeeze", backbone_weights=tmp_path / "other.pth").open()
    with pytest.raises(UserError, match=r"without features.3.weight; allowed: weights of AlexNet"):
        Perceptual(backbone_weights=backbones["squeeze"]).open()


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expunge.eval.checkpoints import cached_download

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    nowhere = (tmp_path / "nothing" / "weights.pth").as_uri()
    with pytest.raises(UserError, match=r"no weights, and cannot download them .* put file:") as e:
        cached_download(nowhere, "weights")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "hub" / "checkpoints" / "weights.pth").exists()


@pytest.mark.parametrize("norm", ["mean_absolute", "rms"])
def test_pixel_distances_are_their_formulas(norm: Any) -> None:
    x, y = pictures(3, 0, 8), pictures(3, 1, 8)
    a, b = ((z.double() + 1) / 2 for z in (x, y))
    each = [
        (p - q).abs().mean() if norm == "mean_absolute" else ((p - q) ** 2).mean().sqrt()
        for p, q in zip(a, b, strict=True)
    ]
    found = measured(PixelDistance(norm=norm), cases_of(3), x, y)
    assert found.value == pytest.approx(float(sum(each)) / 3, rel=1e-9)
    black, white = -torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    assert measured(PixelDistance(norm=norm), cases_of(1), black, white).value == 1


@pytest.fixture(params=["mean_absolute", "rms", "lpips"])
def settings(request: pytest.FixtureRequest, backbones: Any) -> Any:
    if request.param == "lpips":
        return Perceptual(backbone_weights=backbones["alex"], device="cpu")
    return PixelDistance(norm=request.param)


def test_equal_pictures_are_at_no_distance(settings: Any) -> None:
    found = measured(settings, cases_of(4), pictures(4, 0), pictures(4, 0))
    assert (found.value, found.low, found.high, found.n) == (0, 0, 0, 4)


def test_order_does_not_matter(settings: Any) -> None:
    cases, x, y = cases_of(6, prompts=3), pictures(6, 0), pictures(6, 1)
    whole, tally = measured(settings, cases, x, y), settings.open()
    for i in (4, 1, 5, 0, 2, 3):
        tally.update(Batch((cases[i],), x[i : i + 1], y[i : i + 1]))
    found = tally.compute()
    assert found.value == pytest.approx(whole.value, rel=1e-6)
    assert (found.low, found.high) == pytest.approx((whole.low, whole.high), rel=1e-6)


def test_more_noise_is_farther(settings: Any, emoji: Any, spoiled: Any) -> None:
    values = [measured(settings, emoji[0], spoiled(s), emoji[1]).value for s in (0, 0.05, 0.2, 0.6)]
    assert values[0] == 0
    assert values == sorted(set(values))


def test_an_update_that_fails_changes_nothing(settings: Any) -> None:
    tally, cases, x, y = settings.open(), cases_of(4), pictures(4, 0), pictures(4, 1)
    tally.update(Batch(tuple(cases), x, y))
    before = tally.compute()
    with pytest.raises(FloatingPointError, match="NaN"):
        tally.update(Batch(tuple(cases), x * float("nan"), y))
    assert tally.compute() == before


def test_the_base_itself_has_no_distance(settings: Any) -> None:
    found = measured(settings, cases_of(4), pictures(4, 0))
    assert (found.value, found.n) == (None, 0)


def test_a_base_of_another_size_takes_the_pictures_size(settings: Any) -> None:
    large = F.interpolate(pictures(4, 0, 16), scale_factor=8, mode="bicubic").clamp(-1, 1)
    small = F.interpolate(large, (64, 64), mode="bilinear", antialias=True)
    assert measured(settings, cases_of(4), small, large).value == pytest.approx(0, abs=1e-6)
