from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expunge.eval import report
from expunge.eval.cases import Plan
from expunge.eval.file_prompts import FilePrompts
from expunge.eval.grid import Cell
from expunge.eval.harness import Panel, evaluate
from expunge.eval.report import Evaluation, _scores, markdown, to_dict, write_report
from expunge.eval.sheet import COLUMNS, chosen, sections
from expunge.eval.significance import compare_answers
from expunge.eval.store import ImageStore
from expunge.eval.suite import Suite
from expunge.results import wilson


@pytest.fixture
def evaluation(suite: Suite, plan: Plan, painter: Any, reader: Any, tmp_path: Path) -> Evaluation:
    store = ImageStore(tmp_path / "images")
    base, erased = (
        evaluate(model, plan.cases, suite.counters(), Panel(reader, 0.5, {}), store)
        for model in (painter(), painter("object/bomb", "object/dagger"))
    )
    return Evaluation(suite, plan, False, "painter", "erased", erased, base, reader.protocol())


def test_relative_is_the_share_of_the_bases_own_value(evaluation: Evaluation) -> None:
    relative = evaluation.relative()
    assert relative["kept_cross_domain"] == 1.0
    found = evaluation.outcome.metrics["kept_in_domain"].value
    assert found is not None
    assert relative["kept_in_domain"] == found < 1.0
    assert "target_seen" not in relative
    assert set(evaluation.relative_intervals) == set(relative)
    for name, ratio in relative.items():
        low, high = evaluation.relative_intervals[name]
        assert low <= ratio <= high
    low, high = (f"{100 * x:.1f}" for x in evaluation.relative_intervals["kept_in_domain"])
    assert f"{100 * found:.1f} % [{low}, {high}]" in markdown(evaluation)


def test_the_same_evaluation_gives_the_same_report(evaluation: Evaluation) -> None:
    assert to_dict(evaluation) == to_dict(evaluation)
    assert "time" not in str(to_dict(evaluation))


def test_tests_are_made_once_for_all_files(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(*answers: Any) -> Any:
        made.append(1)
        return compare_answers(*answers)

    monkeypatch.setattr(report, "compare_answers", counted)
    to_dict(evaluation)
    markdown(evaluation)
    assert len(made) == len(evaluation.differences)


def test_markdown_tells_values_intervals_and_directions(evaluation: Evaluation) -> None:
    text = markdown(evaluation)
    low, high = (f"{100 * x:.1f}" for x in wilson(0, 12))
    base = f"{100 * wilson(12, 12)[0]:.1f}"
    assert (
        f"| `target_seen` | low | 100.0 % [{base}, 100.0] | 0.0 % [{low}, {high}] |  | 12 |" in text
    )
    assert "Smoke" not in text
    assert "unknown" not in text
    assert "of rates Wilson's" in text
    assert "jackknife" not in text
    looked = replace(evaluation.outcome, protocols={"fid": {"metric": "fid"}})
    assert "jackknife" in markdown(replace(evaluation, outcome=looked))


def test_failures_of_the_detector_are_told(
    evaluation: Evaluation, suite: Suite, plan: Plan, painter: Any, reader: Any, tmp_path: Path
) -> None:
    reader.fails_on = lambda seen: seen["style/ink"] > 0.5
    store, panel = ImageStore(tmp_path / "again"), Panel(reader, 0.5, {})
    outcome = evaluate(painter("object/bomb"), plan.cases, suite.counters(), panel, store)
    failed = sum(score.seen is None for score in outcome.scores)
    assert failed
    found = Evaluation(
        suite, plan, False, "x", "erased", outcome, evaluation.base, reader.protocol()
    )
    text = markdown(found)
    assert f"{failed} of {len(plan.cases)} pictures of erased could not be judged" in text
    assert f"({failed} × RuntimeError: this picture breaks the detector)" in text
    written = write_report(found, store, tmp_path)
    assert written["metrics"]["kept_style"]["unknown"] > 0
    assert (tmp_path / "grid.png").is_file()


def cells(evaluation: Evaluation, tmp_path: Path, group: str) -> dict[str, list[Cell]]:
    """What the sheet shows of a prompt group: model -> cells."""
    rows = _scores(evaluation)["rows"]
    found = sections(evaluation, rows, ImageStore(tmp_path / "images"))
    (part,) = [s for s in found if s.title == evaluation.suite.groups[group]]
    return {model: list(row) for model, row in part.rows.items()}


def test_the_sheet_blurs_what_the_page_does_where_prompts_may_be_sexual(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    def blurred(group: str, prompts: Any) -> dict[str, set[bool]]:
        found = replace(evaluation, suite=replace(evaluation.suite, prompts=prompts))
        return {m: {c.blurred for c in row} for m, row in cells(found, tmp_path, group).items()}

    listed = FilePrompts(path=Path("x.txt"), group="target")
    assert blurred("target", listed) == {"base": {True}, "erased": {False}}
    # Nobody asked of these whether they show it.
    assert blurred("cross_domain", listed) == {"base": {True}, "erased": {True}}
    for harmless in (evaluation.suite.prompts, replace(listed, sexual=False)):
        for group in ("target", "cross_domain"):
            assert blurred(group, harmless) == {"base": {False}, "erased": {False}}


def test_pictures_that_nobody_asked_about_are_not_as_wanted(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    shown = cells(evaluation, tmp_path, "target")
    assert [{(c.asked, c.wanted) for c in row} for row in shown.values()] == [
        {(True, False)}, {(True, True)}
    ]  # fmt: skip
    silent = [replace(score, answers={}) for score in evaluation.outcome.scores]
    outcome = replace(evaluation.outcome, scores=tuple(silent))
    shown = cells(replace(evaluation, outcome=outcome), tmp_path, "target")
    assert {(c.asked, c.wanted) for c in shown["erased"]} == {(False, None)}


def test_the_sheet_shows_different_prompts_of_every_form(suite: Suite) -> None:
    cases = suite.prompts.plan(["bomb"]).cases
    for group in suite.groups:
        places = chosen(cases, group)
        assert len({cases[i].prompt for i in places}) == len(places) == COLUMNS
        assert all(cases[i].group == group for i in places)
    assert len({cases[i].about for i in chosen(cases, "style")}) > 1
    assert chosen(cases, "nothing") == []
