"""What single pictures contribute to metrics: kept in files, paired, tested together with rates."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from expunge.cli import main
from expunge.eval.comparison import Method, compare
from expunge.eval.runs import Run, read_run
from expunge.eval.significance import compare_answers, compare_numbers
from expunge.pictures import save_png, to_pil
from html_pages import Balance

NUMBERS = {"clip", "surprise", "moved"}


@pytest.fixture(scope="module")
def folders(
    suite_file: Path,
    judge_folder: Path,
    tiny_model: Path,
    tiny_lora: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folders a and b: one LoRA at two scales, with metrics of each kind."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("numbers")
    judge = {"type": "emoji_judge", "folder": str(judge_folder)}
    table = yaml.safe_load(suite_file.read_text())
    table["metrics"] |= {
        "clip": {"type": "clip_score", "clip": "emoji", "device": "cpu"},
        "surprise": {"type": "bias", "detector": judge, "groups": ["target", "cross_domain"]},
        "missed": {"type": "bias", "detector": judge, "measure": "miss_rate"},
        "moved": {"type": "distance"},
        "kid": {"type": "kid", "extractor": {"type": "emoji_judge"}},
    }
    (root / "suite.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    for name, scale in (("a", 1.0), ("b", 0.5)):
        words = ["--suite", root / "suite.yaml", "--model", tiny_model, "--lora", tiny_lora,
                 "--lora_scale", scale, "--limit", 4, "--store", root / "images"]  # fmt: skip
        assert main(["eval", *map(str, words), "--output_dir", str(root / name)]) == 0
    return root


def test_a_rerun_is_the_same_evaluation_and_another_reference_is_another(
    suite_file: Path, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reference").mkdir()
    for i in range(2):
        save_png(to_pil(torch.full((3, 32, 32), i / 2)), tmp_path / "reference" / f"{i}.png")
    table = yaml.safe_load(suite_file.read_text())
    own = {"type": "memorisation", "reference": str(tmp_path / "reference"), "threshold": 0.9}
    table["metrics"] |= {
        "copies": own | {"extractor": {"type": "emoji_judge"}},
        "clip": {"type": "clip_score", "clip": "emoji", "device": "cpu"},
        "moved": {"type": "distance"},
        "missed": {"type": "bias", "detector": table["detector"], "measure": "miss_rate"},
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    words = ["eval", "--suite", tmp_path / "suite.yaml", "--model", tiny_model, "--limit", 1]
    words += ["--concept", "a bomb", "--output_dir", tmp_path / "out"]

    def report() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / "out" / "report.json").read_text())
        return {k: v for k, v in found.items() if k != "provenance"}

    assert main(list(map(str, words))) == 0
    first = report()
    assert main(list(map(str, words))) == 0
    assert report() == first
    save_png(to_pil(torch.ones(3, 32, 32)), tmp_path / "reference" / "0.png")
    capfd.readouterr()
    assert main(list(map(str, words))) == 2
    assert "an evaluation with another metrics" in capfd.readouterr().err
    assert report() == first


@pytest.fixture
def pair(folders: Path) -> tuple[Run, Run]:
    return read_run(folders / "a"), read_run(folders / "b")


def test_each_pictures_number_is_kept_and_its_mean_is_the_metric(pair: tuple[Run, Run]) -> None:
    run, _ = pair
    for name in (*NUMBERS, "missed"):
        each = run.answers(name)
        groups = {run.rows[i]["group"] for i in each}
        assert ("pair" in groups) == (name != "surprise")
        assert np.mean(list(each.values())) == pytest.approx(run.report["metrics"][name]["value"])
    assert {type(x) for x in run.answers("missed").values()} == {bool}
    assert run.answers("moved", "base") == run.answers("kid") == {}


def test_the_report_pairs_them_with_the_base(pair: tuple[Run, Run]) -> None:
    run, _ = pair
    found = run.report["differences"]
    rates = {name for name, m in run.report["metrics"].items() if m["unit"] == "share"}
    assert set(found) == rates | {"clip", "surprise"}
    ours, base = run.answers("clip"), run.answers("clip", "base")
    prompts = [run.rows[i]["prompt"] for i in ours]
    wanted = compare_numbers(list(base.values()), list(ours.values()), prompts)
    assert wanted is not None
    assert {k: found["clip"][k] for k in ("difference", "low", "high", "n")} == {
        k: getattr(wanted, k) for k in ("difference", "low", "high", "n")
    }
    assert found["clip"]["p"] >= wanted.p
    assert "| `clip` | " in (run.folder / "report.md").read_text().split("On the same prompts")[1]
    page = (run.folder / "report.html").read_text()
    Balance(page)
    assert f'"values": {{"clip": {ours[0]}' in page


def test_methods_are_paired_by_them_and_corrected_together(
    pair: tuple[Run, Run], folders: Path, tmp_path: Path
) -> None:
    a, b = pair
    found = compare([Method("a", (a,)), Method("b", (b,))])
    between = {d.metric: d for d in found.differences if d.against == "a"}
    assert set(between) == {name for name in a.report["metrics"] if name != "kid"}
    for name in NUMBERS:
        d, prompts = between[name], [a.rows[i]["prompt"] for i in a.answers(name)]
        x, y = (list(run.answers(name).values()) for run in pair)
        assert (d.paired, d.test) == (compare_numbers(x, y, prompts), "paired permutation")
        assert d.p_holm is not None
    prompts = [a.rows[i]["prompt"] for i in a.answers("missed")]
    both: Any = [list(run.answers("missed").values()) for run in pair]
    assert between["missed"].paired == compare_answers(*both, prompts)
    # Of the base there is no distance to itself.
    assert {d.metric for d in found.differences if d.against == "base"} == set(between) - {"moved"}
    words = [folders / "a", f"b={folders / 'b'}", "--output_dir", tmp_path / "out"]
    assert main(["compare", *map(str, words)]) == 0
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written["tests"] == sum(d["p"] is not None for d in written["differences"])
    assert {k: x["kind"] for k, x in written["pareto"]["planes"].items()} == {
        "clip": "quality", "kid": "quality"
    }  # fmt: skip
    assert 'id="planes"' in (tmp_path / "out" / "compare.html").read_text()
    for name in ("compare.md", "compare.html"):
        text = (tmp_path / "out" / name).read_text()
        assert all(f"{metric}" in text for metric in NUMBERS)


def test_of_several_trainings_the_mean_is_paired(pair: tuple[Run, Run]) -> None:
    several = Method("both", pair)
    each, (x, y) = several.answers("clip"), (run.answers("clip") for run in pair)
    assert each == {i: pytest.approx((x[i] + y[i]) / 2) for i in x}  # type: ignore[operator]


def test_files_of_before_are_compared_and_what_they_lack_is_said(
    pair: tuple[Run, Run], tmp_path: Path
) -> None:
    a, b = pair
    old = tmp_path / "old"
    old.mkdir()
    report, rows = json.loads(json.dumps([b.report, b.rows]))
    for row in rows:
        for model in ("base", "erased"):
            del row[model]["values"]
    report["provenance"].pop("scores_sha256")
    (old / "report.json").write_text(json.dumps(report))
    shutil.copy(b.folder / "scores.json", old)
    (old / "scores.json").write_text(json.dumps({"schema_version": 1, "rows": rows}))
    found = compare([Method("a", (a,)), Method("old", (read_run(old, b.images),))])
    (note,) = [note for note in found.notes if "not known" in note]
    assert str(old) in note
    assert str(a.folder) not in note
    between = {d.metric for d in found.differences if d.against == "a"}
    assert not between & (NUMBERS | {"missed"})
    assert "target_seen" in between


def test_a_picture_without_a_number_is_left_out_and_counted(pair: tuple[Run, Run]) -> None:
    a, b = pair
    rows = json.loads(json.dumps(b.rows))
    place = next(iter(b.answers("clip")))
    rows[place]["erased"]["values"]["clip"] = None
    hurt = Run(b.folder, b.report, rows, b.images)
    found = compare([Method("a", (a,)), Method("b", (hurt,))])
    (d,) = [d for d in found.differences if (d.metric, d.against) == ("clip", "a")]
    assert d.paired is not None
    assert (d.unknown, d.paired.n) == (1, len(a.answers("clip")) - 1)
