"""What holds for every row of the table: defaults, round trip, protocol; and the page about it."""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Annotated, Any

import open_clip
import pytest
import torch

from expunge.configuration import dump
from expunge.densities.base import clips_of
from expunge.errors import UserError
from expunge.eval.features import FEATURES
from expunge.eval.metrics import METRICS, Batch
from expunge.eval.metrics.aesthetic import AestheticHead
from expunge.eval.suite import Suite, load_suite
from expunge.pictures import save_png, to_pil
from expunge.schema import Context, decode, encode
from picture_metrics import measured

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"
PICTURES = [name for name in METRICS if name != "seen_rate"]
NEEDED: dict[str, dict[str, Any]] = {
    "aesthetic": {"head": "head.pth"},
    "hps": {"checkpoint": "hps.pt"},
    "memorisation": {"reference": "folder", "threshold": 0.5, "extractor": "emoji_judge"},
    "bias": {"detector": "emoji_judge"},
}
HINT = Annotated[Any, METRICS]


def read(values: dict[str, Any]) -> Any:
    return decode(HINT, values, ("metrics", "x"), Context(Suite), None)


@pytest.mark.parametrize("name", PICTURES)
def test_the_defaults_say_which_way_is_good_and_what_is_meant(name: str) -> None:
    settings = read({"type": name, **NEEDED.get(name, {})})
    assert isinstance(settings.higher_is_better, bool)
    assert len(settings.meaning) > 20
    assert settings.groups == []
    changed = read({
        "type": name, "higher_is_better": not settings.higher_is_better, "meaning": "mine",
        "groups": ["a"], **NEEDED.get(name, {}),
    })  # fmt: skip
    assert changed.higher_is_better is not settings.higher_is_better
    assert (changed.meaning, changed.groups) == ("mine", ["a"])


@pytest.mark.parametrize("name", PICTURES)
def test_settings_survive_the_way_to_yaml_and_back(name: str) -> None:
    settings = read({"type": name, **NEEDED.get(name, {})})
    written = encode(settings, HINT)
    assert written["type"] == name
    assert read(written) == settings
    json.dumps(written)


@pytest.mark.parametrize("name", PICTURES)
def test_the_docstring_tells_formula_interval_and_source(name: str) -> None:
    told = inspect.getdoc(METRICS.load(name)) or ""
    assert re.search(r"arXiv \d{4}\.\d{5}|Source:|same prompt and seed", told)
    assert re.search(r"[Ii]nterval", told)
    assert f"`{name}`" in PAGE.read_text()


@pytest.mark.parametrize("name", ["inception", "dinov2", "clip", "emoji_judge"])
def test_any_extractor_goes_with_the_distances(name: str) -> None:
    for metric in ("fid", "kid", "cmmd", "vendi"):
        settings = read({"type": metric, "extractor": name})
        assert encode(settings, HINT)["extractor"]["type"] == name


@pytest.fixture
def seeing(tiny_clip: str, architecture: str, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Settings with which each row that can see through a CLIP does."""
    features = {"extractor": {"type": "clip", "clip": tiny_clip}}
    texts = {"object/bomb": ["a bomb"], "object/cat": ["a cat"]}
    torch.save(AestheticHead(16).state_dict(), tmp_path / "head.pth")
    torch.save(open_clip.create_model(architecture).state_dict(), tmp_path / "hps.pt")
    pixels = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (tmp_path / "folder").mkdir()
    save_png(to_pil(pixels), tmp_path / "folder" / "0.png")
    copied = {"reference": str(tmp_path / "folder"), "threshold": 0.5}
    return dict.fromkeys(("fid", "kid", "cmmd", "vendi"), features) | {
        "clip_score": {"clip": tiny_clip},
        "aesthetic": {"head": str(tmp_path / "head.pth"), "clip": tiny_clip},
        "hps": {"checkpoint": str(tmp_path / "hps.pt"), "architecture": architecture},
        "memorisation": features | copied,
        "bias": {"detector": {"type": "zero_shot_clip", "clip": tiny_clip, "labels": texts}},
    }


@pytest.mark.parametrize("name", PICTURES)
def test_its_protocol_names_every_clip_that_it_sees_through(
    name: str, seeing: Any, loaded_clips: list[Any]
) -> None:
    if name not in seeing:
        fields = {f.name for f in dataclasses.fields(METRICS.load(name))}
        assert not fields & {"clip", "architecture", "extractor", "detector"}
        return
    protocol = read({"type": name, **seeing[name]}).open().protocol()
    assert set(clips_of(protocol)) == {clip.eye for clip in loaded_clips} != set()


@pytest.mark.parametrize("name", FEATURES.names())
def test_an_extractor_that_takes_a_clip_names_it(
    name: str, tiny_clip: str, loaded_clips: list[Any]
) -> None:
    row = FEATURES.load(name)
    if "clip" in {f.name for f in dataclasses.fields(row)}:
        protocol = row(clip=tiny_clip).open().protocol()
        assert set(clips_of(protocol)) == {clip.eye for clip in loaded_clips} != set()


def test_a_misspelt_extractor_or_formula_is_one_line() -> None:
    with pytest.raises(UserError, match="did you mean dinov2"):
        read({"type": "fid", "extractor": "dino2"})
    with pytest.raises(UserError, match="clipscore"):
        read({"type": "clip_score", "formula": "clip"})


def test_the_suite_of_the_page_measures(tmp_path: Path, emoji: Any, spoiled: Any) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    (tmp_path / "suite.yaml").write_text(block)
    suite = load_suite(str(tmp_path / "suite.yaml"))
    assert set(suite.counters()) == {"target_seen", "kept_cross_domain"}
    pictures = suite.picture_metrics()
    assert set(pictures) == {"kid", "clip_score", "hallucination"}
    assert pictures["kid"].groups == ["cross_domain"]
    plan = suite.prompts.plan(["bomb"])
    assert {case.group for case in plan.cases} == set(suite.groups)
    again = tmp_path / "again.yaml"
    again.write_text(dump(suite))
    assert load_suite(str(again)).sha256() == suite.sha256()
    cases, images = emoji
    for name in ("kid", "hallucination"):
        found = measured(pictures[name], cases, spoiled(0.5), images)
        assert found.n == len(cases)
        assert found.low <= found.value <= found.high
        tally = pictures[name].open()
        tally.update(Batch(tuple(cases), images, None))
        json.dumps(tally.protocol(), allow_nan=False)
        json.dumps(tally.compute().to_dict(), allow_nan=False)
