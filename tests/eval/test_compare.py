import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from scipy import stats

from expunge.cli import main
from expunge.errors import UserError
from expunge.eval import front, thesis_form
from expunge.eval.card import model_index
from expunge.eval.comparison import Method, compare
from expunge.eval.display import difference, probability
from expunge.eval.runs import Run, read_run
from expunge.schema import read_yaml
from html_pages import Balance


@pytest.fixture
def runs(evaluations: Path) -> tuple[Run, Run]:
    return read_run(evaluations / "a"), read_run(evaluations / "b")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: object) -> tuple[int, str]:
        status = main(["compare", *map(str, words)])
        said = capsys.readouterr()
        return status, said.err if status else said.out

    return run


def edited(run: Run, change: Callable[[dict[str, Any], list[Any]], object]) -> Run:
    report, rows = json.loads(json.dumps([run.report, run.rows]))
    change(report, rows)
    return Run(run.folder, report, rows, run.images)


def copied(run: Run, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The run on disk elsewhere, its report changed."""
    folder.mkdir()
    report = json.loads(json.dumps(run.report))
    change(report)
    report["provenance"]["images"] = str(run.images)
    (folder / "report.json").write_text(json.dumps(report))
    shutil.copy(run.folder / "scores.json", folder)
    return folder


def trained(run: Run, seed: int, target: float) -> Run:
    """Another training's evaluation: other weights, other rates."""

    def change(report: dict[str, Any], rows: list[Any]) -> None:
        report["generators"]["erased"]["components"]["unet"] = f"seed {seed}"
        report["metrics"]["target_seen"] |= {"value": target}

    return edited(run, change)


def test_identical_evaluations_do_not_differ(runs: tuple[Run, Run]) -> None:
    a, _ = runs
    found = compare([Method("one", (a,)), Method("two", (a,))])
    between = [d for d in found.differences if d.against == "one"]
    assert {d.metric for d in between} == set(a.report["metrics"])
    for d in between:
        assert d.paired is not None
        assert d.paired.low < d.paired.difference == 0 < d.paired.high
        assert d.paired.p == d.p_holm == 1
        assert (d.paired.n, d.unknown) == (2, 0)


def test_differences_are_those_of_the_pairs(runs: tuple[Run, Run]) -> None:
    def change(report: dict[str, Any], rows: list[Any]) -> None:
        for i, row in enumerate(rows):
            row["prompt"] = f"prompt {i}"
            for metric in row["erased"]["answers"]:
                row["erased"]["answers"][metric] = i % 3 == 0

    # Ten of each, so that something is to be counted.
    def lengthen(report: dict[str, Any], rows: list[Any]) -> None:
        rows.extend(json.loads(json.dumps(rows * 4)))

    a, b = (edited(run, lengthen) for run in runs)
    b = edited(b, change)
    a = edited(a, lambda _, rows: [r.update(prompt=f"prompt {i}") for i, r in enumerate(rows)])
    found = compare([Method("a", (a,)), Method("b", (b,))])
    for d in found.differences:
        if d.of == "b" and d.against == "a":
            x, y = (np.array(run.answers(d.metric), float) for run in (a, b))
            won, lost = int(((y - x) > 0).sum()), int(((x - y) > 0).sum())
            p = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
            assert d.paired is not None
            assert d.paired.difference == pytest.approx((y - x).mean())
            assert d.paired.p == pytest.approx(p)
            assert (d.test, d.paired.n) == ("McNemar, exact", 10)
    ps = sorted((d.paired.p, d.p_holm) for d in found.differences if d.paired and d.p_holm)
    assert len(ps) == found.tests == len(found.differences) == 18
    assert ps[0][0] < 1
    most = 0.0
    for k, (p, corrected) in enumerate(ps):
        most = max(most, min(1, (18 - k) * p))
        assert corrected == pytest.approx(most)


def test_prompts_that_repeat_are_drawn_and_flipped_whole(runs: tuple[Run, Run]) -> None:
    a = edited(runs[0], lambda _, rows: [row.update(prompt="the same") for row in rows])
    found = compare([Method("one", (a,)), Method("two", (a,))])
    assert {d.test for d in found.differences} == {"permutation of prompts"}


def test_what_is_unknown_is_left_out_and_counted(runs: tuple[Run, Run]) -> None:
    def change(report: dict[str, Any], rows: list[Any]) -> None:
        rows[0]["erased"]["answers"]["target_seen"] = None

    a, b = runs
    found = compare([Method("a", (a,)), Method("b", (edited(b, change),))])
    for d in found.differences:
        hurt = d.of == "b" and d.metric == "target_seen"
        assert d.paired is not None
        assert (d.unknown, d.paired.n) == ((1, 1) if hurt else (0, 2))

    def blind(report: dict[str, Any], rows: list[Any]) -> None:
        for row in rows:
            row["erased"]["answers"] = dict.fromkeys(row["erased"]["answers"])

    none = compare([Method("b", (edited(b, blind),))]).differences
    assert all(d.paired is None and d.test is None and d.unknown == 2 for d in none)
    assert none[0].to_dict()["p"] is None


def test_trainings_are_the_trials_of_a_method_with_several(runs: tuple[Run, Run]) -> None:
    a, b = runs
    seeds = tuple(trained(b, i, value) for i, value in enumerate((0.1, 0.2, 0.6)))
    method = Method("ours", seeds)
    m = method.metrics()["target_seen"]
    half = stats.t.ppf(0.975, 2) * np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3)
    assert m["value"] == pytest.approx(0.3)
    assert (m["low"], m["high"]) == (0.0, pytest.approx(0.3 + half))
    # Trainings that agree by chance are not certain.
    same = Method("same", tuple(trained(b, i, 0.5) for i in range(3))).metrics()["target_seen"]
    own = b.report["metrics"]["target_seen"]
    below = math.sqrt(3 * ((0.5 - own["low"]) / 3) ** 2)
    assert same["low"] == pytest.approx(0.5 - below)
    assert (m["checkpoints"], m["n"]) == ([0.1, 0.2, 0.6], 6)
    found = compare([Method("a", (a,)), method])
    for d in found.differences:
        if (d.of, d.against) == ("ours", "a"):
            ours = np.mean([run.answers(d.metric) for run in seeds], axis=0)
            assert d.paired is not None
            assert d.paired.difference == pytest.approx(np.mean(ours - a.answers(d.metric)))
            assert d.test == "permutation of prompts"
    assert any("several trainings" in note for note in found.notes)
    with pytest.raises(UserError, match="same model"):
        Method("ours", (b, b))
    blind = edited(seeds[0], lambda report, _: report["metrics"]["target_seen"].update(value=None))
    assert Method("x", (blind, *seeds[1:])).metrics()["target_seen"]["value"] is None


def test_another_base_is_no_base(runs: tuple[Run, Run]) -> None:
    a, b = runs
    other = edited(b, lambda report, _: report["generators"]["base"].update(dtype="float16"))
    found = compare([Method("a", (a,)), Method("b", (other,))])
    assert found.base is None
    assert {d.against for d in found.differences} == {"a"}
    assert any("different bases" in note for note in found.notes)


def test_the_files(call: Any, runs: tuple[Run, Run], evaluations: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said = call(evaluations / "a", f"SAFREE={evaluations / 'b'}", "--form", "thesis",
                        "--output_dir", out)  # fmt: skip
    assert status == 0
    assert "not comparable" in said
    found = json.loads((out / "compare.json").read_text())
    assert found["schema_version"] == 1
    assert found["smoke"] is True
    assert list(found["methods"]) == ["emoji + negative_prompt", "SAFREE"]
    assert found["methods"]["SAFREE"]["metrics"] == runs[1].report["metrics"]
    assert found["base"] == runs[0].report["base"]
    assert found["of"]["prompts_sha256"] == runs[0].report["prompts_sha256"]
    assert "time" in found["provenance"]
    assert found["tests"] == len(found["differences"]) == 18
    assert set(found["differences"][0]) == {
        "metric", "of", "against", "unit", "higher_is_better", "test", "unknown", "difference",
        "low", "high", "p", "p_holm", "n",
    }  # fmt: skip
    text = (out / "compare.md").read_text()
    assert "not comparable" in text
    assert all(f"| `{name}` |" in text for name in runs[0].report["metrics"])
    page = (out / "compare.html").read_text()
    whole = Balance(page)
    assert all(source.startswith("data:") for source in whole.sources)
    assert not re.search(r"https?://|@import|url\(", page)
    assert whole.tags.count("img") == 3 * len(runs[0].rows)
    assert "blurred" in page.partition("<body>")[2]
    assert "not comparable" in page
    assert 'id="missing"' not in page
    with Image.open(out / "pareto.png") as picture:
        assert picture.width > 600
    assert "| base |" in (out / "thesis.md").read_text()
    assert (out / "thesis.tex").read_text().count(r"\toprule") == 2
    # Nothing is written over unasked.
    assert call(evaluations / "a", "--output_dir", out)[0] == 2
    assert call(evaluations / "a", "--output_dir", out, "--overwrite")[0] == 0
    assert not (out / "thesis.md").exists()


def test_pictures_that_are_gone_are_said(call: Any, evaluations: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    assert call(evaluations / "a", "--store", empty, "--output_dir", out)[0] == 0
    page = (out / "compare.html").read_text()
    assert "20 pictures are not in their store" in page
    assert page.count("picture not in the store") == 20
    assert "<img" not in page


def test_the_page_of_a_comparison_in_a_browser(
    call: Any, visit: Any, evaluations: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert call(evaluations / "b", evaluations / "a", "--output_dir", out)[0] == 0
    page, asked = visit(out / "compare.html")
    assert page.locator("#pareto circle").count() == 3
    page.locator("#paired th button", has_text="difference").click()
    shown = page.locator("#paired tbody td[data-label=difference]")
    values = [float(cell.get_attribute("data-value")) for cell in shown.all()]
    assert values == sorted(values)
    assert len(set(values)) > 1
    page.locator(".case .caption").first.click()
    assert page.locator("dialog h3").all_inner_texts() == [
        "base", "emoji + safree", "emoji + negative_prompt"
    ]  # fmt: skip
    page.keyboard.press("Escape")
    blurred = page.locator(".case .picture.blurred")
    count = blurred.count()
    blurred.first.click()
    assert blurred.count() == count - 1
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert asked == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"suite": "other"}, "suite"),
        ({"version": 2}, "version"),
        ({"suite_sha256": "0"}, "settings"),
        ({"prompts_sha256": "0"}, "prompts"),
        ({"detector": {"detector": "other"}}, "judge"),
        ({"judges": {"second": {}}}, "second judges"),
    ],
)
def test_what_asked_something_else_is_refused(
    call: Any, runs: tuple[Run, Run], evaluations: Path, tmp_path: Path, change: Any, what: str
) -> None:
    other = copied(runs[1], tmp_path / "other", lambda report: report.update(change))
    status, said = call(evaluations / "a", other, "--output_dir", tmp_path / "out")
    assert status == 2
    assert said.count("\n") == 1
    assert f"differ in the {what}" in said
    assert not (tmp_path / "out").exists()


def test_other_seeds_are_refused_whatever_the_hashes_say(
    call: Any, runs: tuple[Run, Run], evaluations: Path, tmp_path: Path
) -> None:
    other = copied(runs[1], tmp_path / "other", lambda r: r["provenance"].pop("scores_sha256"))
    scores = json.loads((other / "scores.json").read_text())
    scores["rows"][3]["seed"] += 1
    (other / "scores.json").write_text(json.dumps(scores))
    status, said = call(evaluations / "a", other, "--output_dir", tmp_path / "out")
    assert (status, "prompts and seeds" in said) == (2, True)


def test_scores_that_are_not_the_reports_are_refused(
    call: Any, runs: tuple[Run, Run], tmp_path: Path
) -> None:
    other = copied(runs[1], tmp_path / "other", lambda report: None)
    text = (other / "scores.json").read_text()
    (other / "scores.json").write_text(text.replace("false", "true", 1))
    status, said = call(other, "--output_dir", tmp_path / "out")
    assert (status, "is not the one that its report.json counted" in said) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "runs"),
        (["missing"], "got missing, whose report.json cannot be read (No such file"),
        (["{a}", "missing,too"], "got missing,too, whose report.json"),
        (["x={a}", "x={b}"], "two evaluations called x"),
        (["base={a}"], "called base"),
        (["x={a},"], "allowed: FOLDER, NAME=FOLDER"),
        (["={a}"], "allowed: FOLDER, NAME=FOLDER"),
        (["x={a},{a}"], "the same model"),
        (["{a}", "--form", "thesys"], "thesis"),
        (["{a}", "--output_dir", "{a}", "--overwrite"], "which holds the evaluation"),
        (["{a}", "--output_dir", "{root}", "--overwrite"], "which holds the evaluation"),
    ],
)
def test_bad_input_is_one_line(
    call: Any, evaluations: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    places = {"a": evaluations / "a", "b": evaluations / "b", "root": evaluations}
    words = [word.format(**places) for word in words]
    if "--output_dir" not in words:
        words += ["--output_dir", str(tmp_path / "out")]
    status, said = call(*words)
    assert status == 2
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "out").exists()
    assert (evaluations / "a" / "report.json").is_file()


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 2}', '{"schema_version": 1}'])
def test_broken_files_are_one_line(
    call: Any, runs: tuple[Run, Run], tmp_path: Path, text: str
) -> None:
    for name in ("report.json", "scores.json"):
        folder = copied(runs[0], tmp_path / name, lambda report: None)
        report = json.loads((folder / "report.json").read_text())
        report["provenance"].pop("scores_sha256")
        (folder / "report.json").write_text(json.dumps(report))
        (folder / name).write_text(text)
        status, said = call(folder, "--output_dir", tmp_path / "out")
        assert (status, said.count("\n")) == (2, 1)
        assert str(folder) in said


def test_equal_titles_are_told_apart_by_their_folders(
    call: Any, runs: tuple[Run, Run], tmp_path: Path
) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        copied(runs[0], tmp_path / name / "report", lambda report: None)
    folders = [tmp_path / "x" / "report", tmp_path / "y" / "report"]
    assert call(*folders, "--output_dir", tmp_path / "out")[0] == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(found["methods"]) == ["x/report", "y/report"]


def share(value: float | None, higher: bool, half: float = 0.1, **more: Any) -> dict[str, Any]:
    low, high = (None, None) if value is None else (value - half, value + half)
    found = {"value": value, "low": low, "high": high, "n": 9, "unknown": 0}
    return found | {"higher_is_better": higher} | more


def test_nobody_beats_those_on_the_front() -> None:
    def metrics(seen: float, *kept: float) -> dict[str, Any]:
        return {"seen": share(seen, False)} | {
            f"kept {i}": share(value, True) for i, value in enumerate(kept)
        }

    measured = {
        "base": metrics(1.0, 0.8, 0.5),
        "best": metrics(0.0, 0.6, 0.5),
        "gentle": metrics(0.2, 0.72, 0.5),
        "harsh": metrics(0.1, 0.4, 0.3),
        "lopsided": metrics(0.1, 0.2, 0.6),
    }
    found = front.points(measured, "base")
    assert found["base"].kept == 1
    assert found["best"].kept == pytest.approx((0.6 / 0.8 + 1) / 2)
    assert found["best"].seen_interval == pytest.approx((-0.1, 0.1))
    half = math.hypot(0.1 / 0.8, 0.1 / 0.5) / 2
    kept = found["best"].kept
    assert found["best"].kept_interval == pytest.approx((kept - half, kept + half))
    assert front.plane_front(found) == ["base", "best", "gentle"]
    # In all metrics its one strength keeps the lopsided one there.
    assert front.full_front(measured)[0] == ["base", "best", "gentle", "lopsided"]
    assert front.points(measured, None)["best"].kept == pytest.approx(0.55)


def test_what_has_no_value_is_no_point_and_numbers_count_in_their_direction() -> None:
    number = {"unit": "number"}
    measured = {
        "a": {"s": share(0.1, False), "k": share(0.9, True), "fid": share(20.0, False, **number)},
        "b": {"s": share(0.1, False), "k": share(0.9, True), "fid": share(30.0, False, **number)},
        "c": {"s": share(None, False), "k": share(0.9, True), "fid": share(10.0, False, **number)},
    }
    assert set(front.points(measured, None)) == {"a", "b"}
    # A suite may have no picture for a metric; that hurts nobody.
    nothing = {name: x | {"none": share(None, True)} for name, x in measured.items()}
    assert front.points(nothing, None) == front.points(measured, None)
    assert front.plane_front(front.points(measured, None)) == ["a", "b"]
    assert front.full_front({k: measured[k] for k in "ab"}) == (["a"], ["s", "k", "fid"])
    assert front.full_front(measured) == (["c"], ["k", "fid"])
    assert front.full_front({"a": {}}) == ([], [])


def test_the_hub_reads_the_model_index(runs: tuple[Run, Run]) -> None:
    report = runs[0].report
    with pytest.raises(ValueError, match="smoke"):
        model_index(report)
    text = model_index(report | {"smoke": False}, "org/model")
    assert (text[:4], text[-5:]) == ("---\n", "\n---\n")
    name, results = model_index_to_eval_results(read_yaml(text.strip("-\n"))["model-index"])
    assert name == "org/model"
    assert [r.metric_type for r in results] == list(report["metrics"])
    for result in results:
        m = report["metrics"][result.metric_type]
        assert result.metric_value == m["value"]
        assert "emoji version 1, n = 2; " in result.metric_name
        assert f"{'higher' if m['higher_is_better'] else 'lower'} is better" in result.metric_name
        assert result.metric_args["low"] == m["low"]
        assert result.dataset_revision == report["suite_sha256"]
    blind = {"target_seen": report["metrics"]["target_seen"] | {"value": None}}
    assert "target_seen" not in model_index(report | {"smoke": False, "metrics": blind})


def test_the_thesiss_two_tables() -> None:
    def metrics(seen: float, kept: float, fid: float) -> dict[str, Any]:
        return {"seen": share(seen, False), "kept_a": share(kept, True),
                "fid": share(fid, False, unit="number")}  # fmt: skip

    measured = {
        "base": metrics(0.9, 1.0, 10),
        "ours": metrics(0.2, 0.8, 14),
        "x & y": metrics(0.3, 0.8, 12),
    }
    breakdown = {
        name: {"seen": {"violence": share(0.1 * i, False), "gore_": share(0.5, False)}}
        for i, name in enumerate(measured)
    }
    safety, quality = thesis_form.tables(measured, breakdown)
    assert safety[1] == ["violence (seen)", "gore_ (seen)", "seen", "fid"]
    assert quality[1] == ["kept_a"]
    text = thesis_form.markdown([safety, quality], list(measured))
    cells = ["ours", "10.0 % [0.0, 20.0]", "50.0 % [40.0, 60.0]", "20.0 % [10.0, 30.0]"]
    assert f"| {' | '.join([*cells, '14 [13.9, 14.1]'])} |" in text
    tex = thesis_form.latex([safety, quality], list(measured))
    assert r"ours & \textbf{10.0 \%} & \textbf{50.0 \%} & \textbf{20.0 \%} & 14 \\" in tex
    assert r"x \& y & 20.0 \% & \textbf{50.0 \%} & 30.0 \% & \textbf{12} \\" in tex
    assert r"base & 0.0 \% & 50.0 \% & 90.0 \% & 10 \\" in tex
    assert r"gore\_ (seen)" in tex


def test_signs_and_small_probabilities() -> None:
    assert difference(-0.125) == "−12.5"
    assert difference(0.5) == "+50.0"
    assert difference(-0.0001) == difference(0.0) == "0.0"
    assert difference(-1.5, "number") == "−1.5"
    assert probability(0.0004) == "< 0.001"
    assert probability(None) == "–"
