"""One contract for every row of the table: settings, documentation, scores, gradients."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

from expunge.concepts import Concept
from expunge.configuration import dump, load, parse
from expunge.densities import DENSITIES
from expunge.densities.base import DensityConfig, HarmDensity, clips_of

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Holder:
    """A configuration that has a density."""

    density: Annotated[DensityConfig, DENSITIES]


def score_of_a_picture(images: torch.Tensor) -> torch.Tensor:
    return images.mean((1, 2, 3)).sigmoid()


@pytest.fixture
def settings(tiny_clip, folder_of, drawn, tmp_path, monkeypatch) -> dict[str, dict[str, Any]]:
    """Settings of every row that can be built here, as a user would write them."""
    from safetensors.torch import save_file

    from expunge.densities.clip_text import ClipText
    from expunge.densities.reference import Reference

    text = {"type": "clip_text", "clip": tiny_clip, "threshold": [0.2, 0.3], "top_k": 1}
    inner = ClipText(clip=tiny_clip, targets=["a bomb"]).build()
    scores = inner(drawn("grey", 200)).per_concept.T.tolist()
    Reference(inner.names, scores, {}, inner.identity()).write(tmp_path / "c.json")
    save_file({"weight": torch.randn(1, 16), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    save_file(
        {"concept_embeds": torch.randn(3, 16), "concept_embeds_weights": torch.zeros(3)},
        tmp_path / "filter.safetensors",
    )
    monkeypatch.setitem(sys.modules, "own_density", sys.modules[__name__])
    return {
        "clip_text": text,
        "clip_images": {"folder": folder_of("red", "red", 4), "clip": tiny_clip},
        "sd_filter": {"file": str(tmp_path / "filter.safetensors"), "clip": tiny_clip},
        "clip_head": {"file": str(tmp_path / "head.safetensors"), "clip": tiny_clip},
        "calibrated": {
            "density": {**text, "targets": ["a bomb"], "threshold": 0.2},
            "file": str(tmp_path / "c.json"),
        },
        "combination": {
            "densities": [text, {"type": "callable", "function": "own_density:score_of_a_picture"}],
            "how": "mean",
        },
        "callable": {"function": "own_density:score_of_a_picture", "threshold": 0.25},
    }


@pytest.fixture(params=DENSITIES.names())
def row(request: pytest.FixtureRequest, settings) -> tuple[str, Holder]:
    import yaml

    name = request.param
    values = {"type": name, **settings[name]}
    return name, parse(Holder, ["--density", yaml.safe_dump(values, default_flow_style=True)])


def build(holder: Holder) -> HarmDensity:
    return holder.density.build(Concept(targets=["a bomb", "a skull"]))


def test_settings_survive_a_file(row: tuple[str, Holder], tmp_path: Path) -> None:
    name, holder = row
    assert type(holder.density) is DENSITIES.load(name)
    assert isinstance(holder.density, DensityConfig)
    (tmp_path / "again.yaml").write_text(dump(holder))
    assert load(Holder, tmp_path / "again.yaml") == holder
    with pytest.raises(dataclasses.FrozenInstanceError):
        holder.density.anything = 1


def test_its_scores_keep_the_contract(row: tuple[str, Holder], drawn: Callable) -> None:
    density = build(row[1])
    images = drawn("red", 3, size=48)
    harm = density(images)
    m = len(density.names)
    assert m >= 1
    assert harm.score.shape == (3,)
    assert harm.per_concept.shape == (3, m)
    assert density.thresholds.shape == (m,)
    low, high = density.span
    assert ((harm.per_concept >= low) & (harm.per_concept <= high)).all()
    assert density.resolution is None or density.resolution > 0
    # One picture's score does not depend on who else is in the batch, nor on precision around it.
    torch.testing.assert_close(density(images[1:2]).score, harm.score[1:2])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(density(images).score, harm.score)
    assert density.fires(images).tolist() == harm.exceeds(density.thresholds).tolist()
    assert not harm.exceeds(float("inf")).any()
    assert density.to("cpu") is density
    torch.testing.assert_close(density(images).score, harm.score)


def test_its_score_has_a_gradient_for_every_picture(row: tuple[str, Holder], drawn) -> None:
    density = build(row[1])
    x = drawn("blue", 2, size=40).requires_grad_()
    density(x).score.sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad.flatten(1).abs().amax(1) > 0).all()
    # What is not seen is not felt: a picture's gradient is its own.
    alone = x.detach()[:1].clone().requires_grad_()
    density(alone).score.sum().backward()
    torch.testing.assert_close(alone.grad, x.grad[:1], rtol=1e-3, atol=1e-6)


def test_nan_pictures_raise(row: tuple[str, Holder]) -> None:
    with pytest.raises(FloatingPointError):
        build(row[1])(torch.full((1, 3, 32, 32), float("nan")))


def test_its_identity_names_every_clip_that_it_sees_through(
    row: tuple[str, Holder], loaded_clips: list[Any]
) -> None:
    loaded_clips.clear()
    identity = build(row[1]).identity()
    assert set(clips_of(identity)) == {clip.eye for clip in loaded_clips}
    assert bool(loaded_clips) == (row[0] != "callable")


@pytest.mark.gpu
def test_it_moves_to_another_device(row: tuple[str, Holder], drawn) -> None:
    here = build(row[1])(drawn("red", 3))
    moved = build(row[1]).to("cuda")
    made = row[1].density.build(Concept(targets=["a bomb", "a skull"]), "cuda")
    for density in (moved, made):
        there = density(drawn("red", 3).cuda())
        assert there.score.device.type == density.thresholds.device.type == "cuda"
        torch.testing.assert_close(there.per_concept.cpu(), here.per_concept, rtol=0.05, atol=5e-3)
        assert density.fires(drawn("red", 3).cuda()).shape == (3,)


def test_what_identifies_it_is_plain_json(row: tuple[str, Holder]) -> None:
    import json

    identity = build(row[1]).identity()
    assert json.loads(json.dumps(identity)) == identity == build(row[1]).identity()


def test_settings_are_read_without_torch() -> None:
    code = (
        "import sys\n"
        "from expunge.densities import DENSITIES\n"
        "for name in DENSITIES: DENSITIES.load(name)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", DENSITIES.names())
def test_it_is_documented(name: str) -> None:
    page = (ROOT / "docs" / "densities.md").read_text(encoding="utf-8")
    assert f"\n## {name}\n" in page
    section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
    for setting in dataclasses.fields(DENSITIES.load(name)):
        assert f"`{setting.name}`" in section, setting.name
    assert "Source:" in section
    assert "Deviation" in section or "ours" in section.lower()
    assert DENSITIES.load(name).__doc__


def test_the_python_of_the_docs_runs(tiny_clip, folder_of, drawn, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of("labelled/harmful", "red", 4)
    folder_of("labelled/benign", "blue", 4)
    page = (ROOT / "docs" / "densities.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    assert len(blocks) == 3
    for block in blocks:
        # The tiny CLIP for the bundled one, which would take longer.
        exec(block.replace('clip="emoji"', f"clip={tiny_clip!r}"), {"images": drawn("red", 2)})
    assert (tmp_path / "head.safetensors").is_file()


def test_the_commands_of_the_docs_are_understood() -> None:
    import shlex

    from expunge.sampling.calibrate import CalibrateConfig

    page = (ROOT / "docs" / "densities.md").read_text(encoding="utf-8")
    lines = page.split("```bash\n")[1].split("```")[0].replace("\\\n", " ").splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("expunge calibrate ")
        parse(CalibrateConfig, shlex.split(line)[2:])
