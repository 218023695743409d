import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from expunge.cli import main, table_rows
from expunge.eval import harness
from expunge.eval.store import ImageStore

METRICS = {
    "target_seen", "kept_in_domain", "kept_cross_domain", "kept_style", "pair_kept",
    "pair_target_seen",
}  # fmt: skip
Evaluate = Callable[..., int]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def evaluate(suite_file: Path, tiny_model: Path) -> Evaluate:
    def run(output_dir: Path, *argv: object, **options: object) -> int:
        options = {"suite": suite_file, "model": tiny_model, "limit": 2} | options
        words = [w for key, value in options.items() for w in (f"--{key}", value)]
        return main(["eval", *map(str, [*words, *argv, "--output_dir", output_dir])])

    return run


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The model of every picture that is generated."""
    count: list[str] = []
    real = harness.produce

    def produce(*args: Any, label: str, **options: Any) -> Any:
        keys, number = real(*args, label=label, **options)
        count.extend([label] * number)
        return keys, number

    monkeypatch.setattr(harness, "produce", produce)
    return count


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def stable(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in report(folder).items() if key != "provenance"}


def pixels(folder: Path) -> "np.ndarray[Any, Any]":
    with Image.open(folder / "grid.png") as image:
        return np.array(image).astype(int)


def answers_of(folder: Path) -> list[Any]:
    rows = json.loads((folder / "scores.json").read_text())["rows"]
    return [[row[model]["answers"] for model in ("base", "erased")] for row in rows]


def test_a_lora_beside_its_base(
    evaluate: Evaluate,
    tiny_lora: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    made: list[str],
) -> None:
    out = tmp_path / "report"
    assert evaluate(out, lora=tiny_lora) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in METRICS)
    assert "smoke run" in table
    assert (made.count("erased"), made.count("base")) == (10, 10)
    found = report(out)
    assert found["schema_version"] == 1
    assert (found["suite"], found["version"], found["smoke"]) == ("emoji", 1, True)
    assert found["concept"] == {"texts": ["a bomb"], "labels": ["object/bomb"]}
    assert set(found["metrics"]) == set(found["base"]) == METRICS
    ids = {name: measured.pop("id") for name, measured in found["metrics"].items()}
    assert all(ids[name].startswith(f"{name}[emoji_judge@") for name in METRICS)
    for measured in [*found["metrics"].values(), *found["base"].values()]:
        assert set(measured) == {
            "value", "low", "high", "n", "unknown", "higher_is_better", "unit"
        }  # fmt: skip
        assert 0 <= measured["low"] <= measured["value"] <= measured["high"] <= 1
        assert measured["n"] == 2
    assert set(found["relative"]) == METRICS - {"target_seen", "pair_target_seen"}
    for name, ratio in found["relative"].items():
        base = found["base"][name]["value"]
        assert ratio == (found["metrics"][name]["value"] / base if base else None)
    assert found["detector"]["threshold"] == 0.5
    assert len(found["detector"]["weights"]) == 64
    (adapter,) = found["generators"]["erased"]["adapters"]
    assert adapter["scale"] == 1.0
    assert found["generators"]["base"]["adapters"] == []
    cost = json.loads((out / "cost.json").read_text())
    assert cost["generated"] == {"erased": 10, "base": 10}
    rows = json.loads((out / "scores.json").read_text())["rows"]
    assert len(rows) == 10
    for row in rows:
        assert {"prompt", "seed", "group", "about", "expected", "base", "erased"} == set(row)
        for model in ("base", "erased"):
            assert set(row[model]["answers"]) == {q["metric"] for q in row["expected"]}
            key = row[model]["picture"]
            assert (out / "images" / key[:2] / f"{key}.png").is_file()
        drawn = [ImageStore(out / "images").read(row[m]["picture"]) for m in ("base", "erased")]
        assert not np.array_equal(*drawn)
    text = (out / "report.md").read_text()
    assert "Smoke run" in text
    assert all(f"| `{name}` |" in text and f"- `{name}`: " in text for name in METRICS)
    with Image.open(out / "grid.png") as grid:
        assert grid.width >= 400
        assert grid.height >= 5 * 2 * 128


def test_a_rerun_resumes_and_says_the_same(
    evaluate: Evaluate, tiny_lora: Path, tmp_path: Path, made: list[str]
) -> None:
    out = tmp_path / "report"
    assert evaluate(out, lora=tiny_lora) == 0
    first, grid, answers = stable(out), pixels(out), answers_of(out)
    lost = sorted((out / "images").rglob("*.png"))[::3]
    for file in lost:
        file.unlink()
    for name in ("report.json", "grid.png"):
        (out / name).unlink()
    made.clear()
    assert evaluate(out, lora=tiny_lora, batch_size=3) == 0
    assert len(made) == len(lost)
    assert stable(out) == first
    assert answers_of(out) == answers
    # Another batch may round the last bit of a float, and so a byte, the other way.
    np.testing.assert_allclose(pixels(out), grid, atol=1)


def test_two_runs_share_the_pictures_of_the_base(
    evaluate: Evaluate, tiny_lora: Path, tmp_path: Path, made: list[str]
) -> None:
    store = tmp_path / "store"
    assert evaluate(tmp_path / "a", lora=tiny_lora, store=store) == 0
    assert evaluate(tmp_path / "b", lora=tiny_lora, store=store, lora_scale=0.5) == 0
    assert (made.count("base"), made.count("erased")) == (10, 20)
    assert not (tmp_path / "a" / "images").exists()
    assert report(tmp_path / "a")["base"] == report(tmp_path / "b")["base"]


def test_a_plain_model_has_no_base(evaluate: Evaluate, tmp_path: Path, made: list[str]) -> None:
    assert evaluate(tmp_path / "r", "--concept", "bomb", "--concept", "a weapon") == 0
    assert set(made) == {"model"}
    found = report(tmp_path / "r")
    assert found["base"] is None
    assert found["relative"] == {}
    assert found["concept"]["texts"] == ["bomb", "a weapon"]
    assert "## Each target" in (tmp_path / "r" / "report.md").read_text()


def test_the_base_can_be_left_out_and_the_concept_said(
    evaluate: Evaluate, tiny_lora: Path, tmp_path: Path, made: list[str]
) -> None:
    assert evaluate(tmp_path / "r", lora=tiny_lora, base="false", concept="ink") == 0
    assert set(made) == {"erased"}
    found = report(tmp_path / "r")
    assert found["base"] is None
    assert found["concept"]["labels"] == ["style/ink"]


def test_a_sampler_beside_its_base(
    evaluate: Evaluate,
    tmp_path: Path,
    made: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "store"

    def run(folder: str, *argv: object) -> int:
        return evaluate(tmp_path / folder, *argv, concept="a bomb", limit=1, store=store)

    assert run("medium", "--sampler", "sld") == 0
    pictures = made.count("base")
    assert (made.count("erased"), pictures) == (pictures, 5)
    found = report(tmp_path / "medium")
    assert found["generators"]["base"]["sampler"] == "plain"
    sampler = found["generators"]["erased"]["sampler"]
    assert (sampler["type"], sampler["preset"]) == ("sld", "medium")
    assert sampler["resolved"]["strength"]["warmup"] == 10
    assert sampler["concept"]["targets"] == ["a bomb"]
    # Another preset, another concept: other pictures; the base's are there.
    assert run("max", "--sampler", "sld", "--sampler.preset", "max") == 0
    assert (made.count("erased"), made.count("base")) == (2 * pictures, pictures)
    assert run("two", "--sampler", "sld", "--concept", "a weapon") == 0
    assert made.count("erased") > 2 * pictures
    capsys.readouterr()
    assert run("medium", "--sampler", "sld", "--sampler.warmup", "0") == 2
    assert "another sampler;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither --concept nor --lora"),
        ({"concept": "a bom"}, "did you mean bomb"),
        ({"concept": "bomb", "limit": 0}, "got limit 0"),
        ({"concept": "bomb", "batch_size": 0}, "got batch_size 0"),
        ({"concept": "bomb", "threads": 0}, "got threads 0"),
        ({"concept": "bomb", "processes": 0}, "got processes 0"),
        ({"concept": "bomb", "suite": "emojy"}, "did you mean emoji"),
        ({"concept": "bomb", "sampler": "plane"}, "did you mean plain"),
        ({"concept": "bomb", "model": "missing"}, "got model 'missing'"),
        ({"concept": "bomb", "lora": "missing"}, "got LoRA missing"),
        ({"concept": "bomb", "stor": "x"}, "did you mean store"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(
    evaluate: Evaluate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, object],
    message: str,
) -> None:
    assert evaluate(tmp_path / "r", **options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "r").exists()


def test_a_lora_that_does_not_say_what_it_erases_needs_a_concept(
    evaluate: Evaluate, tiny_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    lora = tmp_path / "foreign.safetensors"
    save_file(load_file(tiny_lora / "pytorch_lora_weights.safetensors"), lora)
    assert evaluate(tmp_path / "r", lora=lora) == 2
    assert "does not say what it erases" in capsys.readouterr().err
    assert evaluate(tmp_path / "r", lora=lora, concept="bomb", base="false") == 0


def test_another_evaluation_is_not_written_over(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    assert evaluate(out, concept="bomb") == 0
    first = stable(out)
    assert evaluate(out, concept="pill") == 2
    assert "another concept;" in capsys.readouterr().err
    assert evaluate(out, concept="bomb", limit=1) == 2
    assert "another limit;" in capsys.readouterr().err
    assert stable(out) == first
    assert evaluate(out, concept="pill", overwrite="true") == 0
    assert report(out)["concept"]["texts"] == ["pill"]


def test_a_model_that_changed_on_disk_is_another_evaluation(
    evaluate: Evaluate, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    model = shutil.copytree(tiny_model, tmp_path / "model")
    assert evaluate(tmp_path / "r", concept="bomb", model=model) == 0
    settings = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    settings["prediction_type"] = "v_prediction"
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    assert evaluate(tmp_path / "r", concept="bomb", model=model) == 2
    assert "components changed" in capsys.readouterr().err


def test_results_of_other_commands_are_never_emptied(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".expunge").touch()
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    for overwrite in ("false", "true"):
        assert evaluate(tmp_path, concept="bomb", overwrite=overwrite) == 2
        assert "no evaluation" in capsys.readouterr().err
    assert (tmp_path / "pytorch_lora_weights.safetensors").read_bytes() == b"weights"


def test_suites_detectors_and_metrics_are_listed() -> None:
    assert "emoji" in table_rows("suites")
    assert "emoji_judge" in table_rows("detectors")
    assert "seen_rate" in table_rows("metrics")
