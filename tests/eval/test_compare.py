"""`expunge compare`: its files, its page, and what it refuses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from expunge.cli import main
from expunge.eval.runs import Run
from html_pages import Balance


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: object) -> tuple[int, str]:
        status = main(["compare", *map(str, words)])
        said = capsys.readouterr()
        return status, said.err if status else said.out

    return run


def copied(run: Run, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The run on disk elsewhere, its report changed."""
    folder.mkdir()
    report = json.loads(json.dumps(run.report))
    change(report)
    report["provenance"]["images"] = str(run.images)
    (folder / "report.json").write_text(json.dumps(report))
    shutil.copy(run.folder / "scores.json", folder)
    return folder


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
