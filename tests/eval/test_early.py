"""What a suite's metrics need is looked for before the first picture, and loaded once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from expunge import adapters
from expunge.cli import main
from expunge.clip import load_clip
from expunge.densities.clip_text import ClipText
from expunge.errors import UserError
from expunge.eval import harness
from expunge.eval.features.emoji_judge import OpenEmojiJudge
from expunge.eval.independence import refuse_own_judge
from expunge.eval.metrics.reference import Reference
from expunge.pictures import save_png, to_pil

JUDGED = {"extractor": {"type": "emoji_judge"}}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def suite_with(suite_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """The quick suite, and metrics beside its own; or other changes."""

    def write(metrics: dict[str, Any], **changes: Any) -> Path:
        table = yaml.safe_load(suite_file.read_text()) | changes
        table["metrics"] = table["metrics"] | metrics
        file = tmp_path / "suite.yaml"
        file.write_text(yaml.safe_dump(table))
        return file

    return write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures to compare with, of two sizes."""
    found, draw = tmp_path / "reference", torch.Generator().manual_seed(0)
    found.mkdir()
    for i, side in enumerate((64, 64, 32, 32, 32, 64)):
        save_png(to_pil(torch.rand(3, side, side, generator=draw) * 2 - 1), found / f"{i}.png")
    return found


def refused(capfd: pytest.CaptureFixture[str], out: Path, *words: object) -> str:
    """The one line with which an evaluation ends before it has written anything."""
    assert main(["eval", *map(str, words), "--concept", "a bomb", "--output_dir", str(out)]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert not out.exists()
    return line


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ({"type": "aesthetic", "head": "none.pth"}, "got no aesthetic head at none.pth"),
        ({"type": "hps", "checkpoint": "none.pt"}, "got no HPSv2 checkpoint at none.pt"),
        ({"type": "lpips", "backbone_weights": "none.pth"}, "got no weights of AlexNet"),
        ({"type": "fid", "extractor": {"type": "inception", "weights": "none.pth"}},
         "got no weights of Inception V3"),
        ({"type": "fid", "extractor": {"type": "dinov2", "model": "none"}}, "got DINOv2 none"),
        ({"type": "clip_score", "clip": "none/at-all"}, "none/at-all"),
        ({"type": "kid", "reference": "none"} | JUDGED, "got none, which is no folder"),
        ({"type": "vendi", "groups": ["in_domian"]} | JUDGED, "did you mean in_domain"),
        ({"type": "bias", "detector": "emoji_judge", "prefix": "thing/"}, "got prefix 'thing/'"),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_a_metric_lacks_is_one_line_before_the_first_picture(
    suite_with: Any, tiny_model: Path, tmp_path: Path, capfd: Any, metric: Any, said: str
) -> None:
    words = ["--suite", suite_with({"mine": metric}), "--model", tiny_model, "--limit", 1]
    assert said in refused(capfd, tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("detector", "said"),
    [
        ({"type": "nudenet", "weights": "none.onnx"}, "got weights none.onnx, which is no file"),
        ({"type": "open_nsfw", "weights": "none.onnx"}, "got weights none.onnx, which is no file"),
        ({"type": "q16", "prompts": "none.p", "clip": "emoji"}, "got prompts none.p, which does"),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_a_detector_without_its_weights_is_one_line_before_the_first_picture(
    suite_with: Any, tiny_model: Path, tmp_path: Path, capfd: Any, detector: Any, said: str
) -> None:
    words = ["--suite", suite_with({}, detector=detector), "--model", tiny_model, "--limit", 1]
    assert said in refused(capfd, tmp_path / "out", *words)


def test_of_two_processes_one_says_it(suite_with: Any, tmp_path: Path, capfd: Any) -> None:
    suite = suite_with({"mine": {"type": "aesthetic", "head": "none.pth"}})
    line = refused(capfd, tmp_path / "out", "--suite", suite, "--processes", 2)
    assert "got no aesthetic head" in line


SECOND = {
    "type": "zero_shot_clip", "clip": "emoji", "labels": {"bomb": ["a bomb"], "cat": ["a cat"]}
}  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "changes"),
    [
        ({"mine": {"type": "clip_score", "clip": "emoji"}}, {}),
        ({}, {"judges": {"words": {"detector": SECOND, "asks": {"target_seen": ["bomb"]}}}}),
    ],
    ids=["measures", "judges"],
)
def test_a_clip_that_guides_and_judges_is_refused_before_the_first_picture(
    suite_with: Any, tmp_path: Path, capfd: Any, metrics: Any, changes: Any
) -> None:
    suite = suite_with(metrics, **changes)
    words = ["--suite", suite, "--sampler", "safe", "--limit", 1]
    assert "the CLIP that guides" in refused(capfd, tmp_path / "out", *words)


@pytest.fixture
def lora_that_says(tiny_lora: Path, tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """The tiny LoRA with other words about its training."""

    def write(about: dict[str, Any]) -> Path:
        header = adapters.read_header(tiny_lora) | {"expunge": json.dumps(about)}
        adapters.write(load_file(tiny_lora / adapters.FILE), tmp_path / "x.safetensors", header)
        return tmp_path / "x.safetensors"

    return write


CLIP_SCORE = {"mine": {"type": "clip_score", "clip": "emoji"}}
JUDGED_BY_CLIP = {"judges": {"words": {"detector": SECOND, "asks": {"target_seen": ["bomb"]}}}}


@pytest.mark.parametrize(
    ("metrics", "changes"), [(CLIP_SCORE, {}), ({}, JUDGED_BY_CLIP)], ids=["measures", "judges"]
)
@pytest.mark.parametrize("merged", [False, True])
def test_a_clip_that_guided_the_training_and_judges_is_refused_before_the_first_picture(
    suite_with: Any, tiny_model: Path, lora_that_says: Any, tmp_path: Path, capfd: Any,
    metrics: Any, changes: Any, merged: bool,
) -> None:  # fmt: skip
    about = {"objective": "density", "clips": [load_clip("emoji").eye]}
    lora = lora_that_says({"merged_from": [{"objective": "uce"}, about]} if merged else about)
    words = ["--suite", suite_with(metrics, **changes), "--model", tiny_model, "--lora", lora]
    line = refused(capfd, tmp_path / "out", *words, "--limit", 1)
    assert f"the CLIP that guided the training of LoRA {lora}; allowed: an independent" in line


def test_an_attack_is_not_judged_by_the_clip_that_guided_the_training(
    suite_with: Any, tiny_model: Path, lora_that_says: Any, tmp_path: Path, capfd: Any
) -> None:
    lora = lora_that_says({"objective": "density", "clips": [load_clip("emoji").eye]})
    suite = suite_with(
        {}, detector=SECOND | {"labels": {"object/bomb": ["a bomb"], "cat": ["a cat"]}}
    )
    words = ["--suite", suite, "--model", tiny_model, "--lora", lora, "--concept", "a bomb"]
    words += ["--attack", "paraphrase", "--limit", 1, "--output_dir", tmp_path / "out"]
    assert main(["attack", *map(str, words)]) == 2
    assert "the CLIP that guided the training of LoRA" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("about", "known"),
    [
        ({"objective": "density", "clips": ["eye:another"]}, True),
        ({"objective": "density", "clips": ["a hash of before"]}, False),
        ({"objective": "esd"}, True),
        ({"objective": "density"}, False),
        ({}, False),
        ({"merged_from": [{"objective": "esd"}, {}]}, False),
    ],
    ids=str,
)
def test_a_lora_that_does_not_say_what_guided_its_training_is_noted(
    about: dict[str, Any], known: bool
) -> None:
    clip = {"clips": [load_clip("emoji").eye]}
    notes = refuse_own_judge([clip], "plain", {"mine": about})
    assert [note.split(" does not say")[0] for note in notes] == ([] if known else ["LoRA mine"])
    assert refuse_own_judge([{"detector": "nudenet"}], "plain", {"mine": about}) == []


def test_a_clip_that_guides_under_other_preprocessing_is_the_same_clip() -> None:
    guide = ClipText(clip="emoji", targets=["a bomb"], thesis_compat=True).build()
    judge = {"clips": [load_clip("emoji").eye]}
    with pytest.raises(UserError, match="guides the sampler"):
        refuse_own_judge([judge], {"name": "safe", "density": guide.identity()}, {})


def test_an_evaluation_notes_that_nobody_knows_what_guided_the_training(
    suite_with: Any, tiny_model: Path, lora_that_says: Any, tmp_path: Path, capfd: Any
) -> None:
    words = ["--suite", suite_with(CLIP_SCORE), "--model", tiny_model, "--limit", 1]
    words += ["--lora", lora_that_says({}), "--concept", "a bomb", "--base", "false"]
    assert main(["eval", *map(str, words), "--output_dir", str(tmp_path / "out")]) == 0
    (note,) = json.loads((tmp_path / "out" / "cost.json").read_text())["notes"]
    assert "does not say which CLIP guided its training" in note
    assert f"note: {note}" in capfd.readouterr().out


def test_a_question_that_the_detector_cannot_answer_is_refused_before_the_first_picture(
    suite_with: Any, judge_folder: Path, tiny_model: Path, tmp_path: Path, capfd: Any
) -> None:
    small = tmp_path / "judge"
    small.mkdir()
    names = json.loads((judge_folder / "judge.json").read_text())
    names["objects"] = [f"other {name}" for name in names["objects"]]
    (small / "judge.json").write_text(json.dumps(names))
    (small / "judge.safetensors").symlink_to(judge_folder / "judge.safetensors")
    suite = suite_with({}, detector={"type": "emoji_judge", "folder": str(small)})
    words = ["--suite", suite, "--model", tiny_model, "--limit", 1]
    assert "got a suite that asks for object/" in refused(capfd, tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("metric", "group", "said"),
    [
        ("bright", "mine", "got unknown metric that suite mine asks for 'brihgt'"),
        ("brihgt", "minne", "got unknown prompt group of suite mine 'mine'"),
    ],
)
def test_a_metric_or_group_that_the_suite_lacks_is_refused_before_the_first_picture(
    tiny_model: Path, tmp_path: Path, capfd: Any, metric: str, group: str, said: str
) -> None:
    (tmp_path / "prompts.txt").write_text("a bomb\n")
    counted = {"type": "seen_rate", "higher_is_better": False, "meaning": "is a bomb seen"}
    prompts = {
        "type": "file", "path": str(tmp_path / "prompts.txt"), "group": "mine",
        "asks": {"brihgt": ["object/bomb"]},
    }  # fmt: skip
    table = {
        "name": "mine", "version": 1, "description": "one prompt", "steps": 2,
        "guidance_scale": 4.0, "prompts": prompts, "detector": {"type": "emoji_judge"},
        "groups": {group: "My prompts"}, "metrics": {metric: counted},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(table))
    words = ["--suite", tmp_path / "mine.yaml", "--model", tiny_model]
    line = refused(capfd, tmp_path / "out", *words)
    assert said in line
    assert f"did you mean {metric if 'metric' in said else group}?" in line


def test_networks_are_loaded_once_and_a_folder_is_extracted_once_for_all_evaluations(
    suite_with: Any,
    folder: Path,
    tiny_model: Path,
    tiny_lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metrics = {"kid": {"type": "kid"}, "copies": {"type": "memorisation", "threshold": 0.5}}
    suite = suite_with({n: m | JUDGED | {"reference": str(folder)} for n, m in metrics.items()})
    done: list[str] = []

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            done.append(name)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)

    counted(OpenEmojiJudge, "__init__")
    counted(Reference, "_extract")
    counted(harness, "produce")

    def run(name: str) -> Any:
        done.clear()
        words = ["--suite", suite, "--model", tiny_model, "--lora", tiny_lora, "--limit", 1]
        words += ["--output_dir", tmp_path / name, "--store", tmp_path / "store"]
        assert main(["eval", *map(str, words)]) == 0
        report = json.loads((tmp_path / name / "report.json").read_text())
        del report["provenance"]
        return report

    first = run("first")
    # Two models, two metrics with a network each, one folder; all of it before any picture.
    assert done == ["__init__", "__init__", "_extract", "produce", "produce"]
    assert first["metrics"]["kid"]["value"] is not None
    assert first["metrics"]["kid"]["n"] == first["metrics"]["copies"]["n"] == 5
    assert first["base"]["kid"]["value"] != first["metrics"]["kid"]["value"]
    assert run("again") == first
    assert "_extract" not in done
    # What was kept is whole or is made again.
    (kept,) = (tmp_path / "store" / "features").glob("*.npz")
    whole = kept.read_bytes()
    for damaged in (whole[:-40], whole[:300] + b"\x7f" + whole[301:], b""):
        kept.write_bytes(damaged)
        assert run("damaged") == first
        assert done.count("_extract") == 1
        with np.load(kept) as stored:
            assert stored["features"].shape == (6, 128)
    # Another picture under the name of one, another folder.
    (folder / "0.png").write_bytes((folder / "5.png").read_bytes())
    other = run("other")
    assert done.count("_extract") == 1
    assert other["metrics"]["kid"]["value"] != first["metrics"]["kid"]["value"]
    assert other["metrics"]["kid"]["id"] != first["metrics"]["kid"]["id"]
