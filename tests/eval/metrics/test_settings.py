"""What holds for every row of the table: defaults, round trip, protocol; and the page about it."""

import inspect
import json
import re
from pathlib import Path
from typing import Annotated, Any

import pytest

from expunge.configuration import dump
from expunge.errors import UserError
from expunge.eval.metrics import METRICS, Batch
from expunge.eval.suite import Suite, load_suite
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
