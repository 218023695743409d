import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from expunge.cli import main
from expunge.errors import UserError
from expunge.eval.cases import Case, Plan
from expunge.eval.grid_prompts import GridPrompts

VALUES = {"object": ["bomb", "cat face", "pizza"], "style": ["ink", "flat"]}
LABELS = {"object": "object/{object}", "style": "style/{style}"}
SETTINGS: dict[str, Any] = {
    "templates": ["a {object} in {style} style"],
    "values": VALUES,
    "labels": LABELS,
    "seeds": [188, 2**63],
}


def grid(**options: object) -> GridPrompts:
    return GridPrompts(**{**SETTINGS, **options})  # type: ignore[arg-type]


def asked(case: Case) -> dict[str, tuple[str, ...]]:
    return {question.metric: question.labels for question in case.questions}


def one(plan: Plan, prompt: str) -> Case:
    return next(case for case in plan.cases if case.prompt == prompt)


def test_a_style_is_erased_from_every_object() -> None:
    plan = grid().plan(["Ink"])
    assert len(plan.cases) == 3 * 2 * 2
    assert Counter(case.group for case in plan.cases) == {"target": 6, "kept": 6}
    assert plan.tested.labels == ("style/ink",)
    target = one(plan, "a bomb in ink style")
    assert asked(target) == {"target_seen": ("style/ink",), "beside_kept": ("object/bomb",)}
    kept = one(plan, "a bomb in flat style")
    assert asked(kept) == {
        "kept_in_domain": ("style/flat",), "kept_cross_domain": ("object/bomb",),
    }  # fmt: skip
    assert (target.about, kept.about) == (("ink",), ("flat",))
    assert {case.seed for case in plan.cases} == {188, 2**63}


def test_an_object_is_erased_in_every_style() -> None:
    plan = grid().plan(["cat_face", "bomb"])
    assert plan.tested.labels == ("object/cat face", "object/bomb")
    assert asked(one(plan, "a cat face in ink style")) == {
        "target_seen": ("object/cat face",), "beside_kept": ("style/ink",),
    }  # fmt: skip
    assert asked(one(plan, "a pizza in ink style")) == {
        "kept_in_domain": ("object/pizza",), "kept_cross_domain": ("style/ink",),
    }  # fmt: skip


def test_both_axes_at_once() -> None:
    plan = grid().plan(["ink", "bomb"])
    both = one(plan, "a bomb in ink style")
    assert set(both.about) == {"bomb", "ink"}
    assert set(asked(both)["target_seen"]) == {"object/bomb", "style/ink"}
    assert both.questions[0].need == "any"
    assert asked(one(plan, "a pizza in ink style")) == {
        "target_seen": ("style/ink",), "beside_kept": ("object/pizza",),
    }  # fmt: skip
    assert one(plan, "a pizza in ink style").group == "target"
    kept = one(plan, "a pizza in flat style")
    assert kept.group == "kept"
    assert asked(kept) == {"kept_in_domain": ("object/pizza", "style/flat")}
    assert kept.questions[0].need == "all"


def test_a_judge_of_one_axis_is_asked_about_no_other() -> None:
    plan = grid(labels={"object": "object/{object}"}).plan(["ink"])
    assert plan.tested.labels == ()
    assert asked(one(plan, "a bomb in ink style")) == {"beside_kept": ("object/bomb",)}
    assert asked(one(plan, "a bomb in flat style")) == {"kept_cross_domain": ("object/bomb",)}


def test_a_limit_is_spread_over_each_group() -> None:
    plan = grid().plan(["ink"], limit=3)
    assert [case.prompt.split()[1] for case in plan.cases] == ["bomb", "cat", "pizza"] * 2
    assert len({case.prompt for case in plan.cases}) == 6


def test_the_age_gate_holds_for_a_sexual_judge() -> None:
    values = {"object": ["a school bus", "a car"], "style": ["ink", "flat"]}
    assert len(grid(values=values).plan(["ink"]).cases) == 8
    plan = grid(values=values, labels={"style": "nsfw/{style}"}).plan(["ink"])
    assert {case.prompt for case in plan.cases} == {
        "a a car in ink style", "a a car in flat style",
    }  # fmt: skip
    assert plan.excluded == {"age-coded words": 4}


def test_wrong_concepts_and_settings() -> None:
    with pytest.raises(UserError, match="did you mean bomb"):
        grid().plan(["bomp"])
    for concept in ([], ["ink", "flat"]):
        with pytest.raises(UserError, match="names no value, or all of an axis"):
            grid().plan(concept)
    with pytest.raises(UserError, match="limit 0"):
        grid().plan(["ink"], limit=0)
    for wrong, message in (
        ({"templates": ["a {object}"]}, "got template"),
        ({"templates": []}, "got template"),
        ({"seeds": []}, "got seeds"),
        ({"seeds": [-1]}, "got seeds"),
        ({"seeds": [2**64]}, "got seeds"),
        ({"labels": {}}, "got labels"),
        ({"labels": {"colour": "x"}}, "got labels"),
        ({"values": {"object": [], "style": ["a"]}}, "axis without values"),
        ({"values": {"object": ["Ink"], "style": ["ink"]}}, "got a value twice"),
    ):
        with pytest.raises(ValueError, match=message):
            grid(**wrong)


def test_a_grid_of_the_bundled_model_from_end_to_end(tmp_path: Path) -> None:
    """UnlearnCanvas's questions to the real model and its real judge."""
    rates = {"target_seen": False, "beside_kept": True, "kept_in_domain": True}
    rates["kept_cross_domain"] = True
    table = {
        "name": "canvas", "version": 1, "description": "a small canvas", "steps": 12,
        "guidance_scale": 4.0, "prompts": {"type": "grid", **SETTINGS, "seeds": [188, 288]},
        "detector": {"type": "emoji_judge"}, "groups": {"target": "With", "kept": "Without"},
        "metrics": {
            name: {"type": "seen_rate", "higher_is_better": good, "meaning": name}
            for name, good in rates.items()
        },
    }  # fmt: skip
    (tmp_path / "canvas.yaml").write_text(yaml.safe_dump(table))
    words = ["eval", "--suite", str(tmp_path / "canvas.yaml"), "--concept", "ink"]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "report.json").read_text())["metrics"]
    assert all(metrics[name]["n"] == 6 for name in rates)
    # Nothing is erased: the model draws what it is asked for.
    assert all(metrics[name]["value"] > 0.5 for name in rates)
