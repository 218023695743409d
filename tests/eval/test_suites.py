"""Every shipped suite: it loads, says where its prompts come from, asks what its judge tells."""

import csv
import hashlib
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from expunge.cli import main
from expunge.configuration import dump
from expunge.errors import UserError
from expunge.eval.detectors import DETECTORS
from expunge.eval.file_prompts import FilePrompts
from expunge.eval.grid_prompts import GridPrompts
from expunge.eval.metrics import METRICS
from expunge.eval.suite import Suite, load_suite, shipped, with_prompts

I2P = ("i2p_sexual", "i2p_nudity", "i2p_violence", "i2p_shocking", "i2p_all")
HEADER = [
    "prompt", "categories", "hard", "inappropriate_percentage", "nudity_percentage",
    "q16_percentage", "sd_safety_percentage", "prompt_toxicity", "lexica_url", "sd_seed",
    "sd_guidance_scale", "sd_image_width", "sd_image_height", "sd_model",
]  # fmt: skip


def table_of(name: str) -> dict[str, Any]:
    file = resources.files("expunge.eval.suites") / f"{name}.yaml"
    table: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return table


def lacking(table: dict[str, Any]) -> set[str]:
    """The detectors and metrics of a suite that this installation does not have."""
    judges = [judge["detector"] for judge in table.get("judges", {}).values()]
    detectors = {detector["type"] for detector in [table["detector"], *judges]}
    metrics = {metric["type"] for metric in table["metrics"].values()}
    return (detectors - set(DETECTORS)) | (metrics - set(METRICS))


def with_emoji_judge(name: str, tmp_path: Path) -> Suite:
    """The shipped suite with a judge that is always there."""
    table = table_of(name) | {"detector": {"type": "emoji_judge"}, "judges": {}}
    table["metrics"] = {n: m for n, m in table["metrics"].items() if m["type"] in METRICS}
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(table))
    return load_suite(str(file))


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_suite_loads(name: str) -> None:
    if missing := lacking(table_of(name)):
        pytest.skip(f"no {', '.join(sorted(missing))} here")
    suite = load_suite(name)
    assert suite.name == name
    assert suite.description == shipped()[name]
    assert suite.sha256() == load_suite(name).sha256()


def test_a_name_with_the_sign_between_metric_and_judge_is_refused() -> None:
    suite = load_suite("emoji")
    with pytest.raises(ValueError, match="without @"):
        replace(suite, metrics=suite.metrics | {"ua@style": suite.metrics["target_seen"]})


def test_a_suite_is_the_same_wherever_its_files_lie_and_whatever_computes(tmp_path: Path) -> None:
    def digest(root: str, device: str, threshold: float = 0.9) -> str:
        folder = tmp_path / root
        (folder / "clip").mkdir(parents=True, exist_ok=True)
        weights = {"type": "inception", "weights": f"{folder}/inception.pt", "device": device}
        table = table_of("prompts") | {"judges": {}, "detector": {"type": "emoji_judge"}}
        table["prompts"]["path"] = f"{folder}/list.csv"
        table["metrics"] |= {
            "copies": {"type": "memorisation", "reference": f"{folder}/known",
                       "threshold": threshold, "extractor": weights},
            "clip": {"type": "clip_score", "clip": f"{folder}/clip", "device": device},
        }  # fmt: skip
        (folder / "suite.yaml").write_text(yaml.safe_dump(table))
        return load_suite(str(folder / "suite.yaml")).sha256()

    assert digest("a", "cpu") == digest("b", "cuda")
    assert digest("a", "cpu") != digest("a", "cpu", threshold=0.8)
    # What has neither paths nor devices of its own hashes as it is written.
    emoji = load_suite("emoji")
    assert emoji.sha256() == hashlib.sha256(dump(emoji).encode()).hexdigest()


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_suite_says_where_its_prompts_come_from(name: str, tmp_path: Path) -> None:
    suite = with_emoji_judge(name, tmp_path)
    prompts = suite.prompts
    if not isinstance(prompts, FilePrompts):
        return
    assert {prompts.group} == set(suite.groups)
    assert {*prompts.asks, *prompts.answers} == set(suite.counters())
    with pytest.raises(UserError) as error:
        prompts.plan(["anything"])
    assert prompts.source
    assert prompts.source in str(error.value)
    assert "--prompts FILE" in str(error.value)
    assert "\n" not in str(error.value)
    table = table_of(name)
    assert table["metrics"]
    for judge in table.get("judges", {}).values():
        assert set(judge["asks"]) <= set(suite.counters())


def test_lists_of_sexual_prompts_are_behind_the_age_gate(tmp_path: Path) -> None:
    ungated = {
        name
        for name in shipped()
        for prompts in [with_emoji_judge(name, tmp_path).prompts]
        if isinstance(prompts, FilePrompts) and not prompts.sexual
    }
    objects = ("church", "garbage_truck", "parachute", "tench", "vangogh")
    assert ungated == {"coco_500", "coco_1k", "coco_10k", "coco_30k"} | {
        f"unlearndiffatk_{name}" for name in objects
    }


@pytest.fixture
def i2p_file(tmp_path: Path) -> Path:
    """Harmless sentences under I2P's columns."""
    rows = [
        ("a marble statue", "sexual, harassment", "12.5", "4048860635", "7", "512", "512"),
        ("two wolves, fighting", "violence", "0.0", "7", "8.5", "512", "768"),
        ("a shady deal", "illegal activity", "3.0", "11", "7.0", "512", "512"),
        ("a child with a kite", "sexual", "40.0", "12", "7", "512", "512"),
        ("a storm at sea", "shocking,violence", "0.0", "4294967295", "12", "640", "512"),
        ("teenagers in the park", "violence, shocking", "1.0", "13", "7", "512", "512"),
    ]
    file = tmp_path / "i2p_benchmark.csv"
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, HEADER, restval="0")
        writer.writeheader()
        for prompt, categories, nudity, seed, scale, width, height in rows:
            writer.writerow(
                {
                    "prompt": prompt, "categories": categories, "nudity_percentage": nudity,
                    "sd_seed": seed, "sd_guidance_scale": scale, "sd_image_width": width,
                    "sd_image_height": height, "lexica_url": "https://lexica.art/prompt/0a1b",
                }
            )  # fmt: skip
    return file


def test_i2p_is_read_whole(i2p_file: Path, tmp_path: Path) -> None:
    expected = {
        "i2p_sexual": ({"a marble statue"}, 1),
        "i2p_nudity": ({"a marble statue", "a shady deal"}, 2),
        "i2p_violence": ({"two wolves, fighting", "a storm at sea"}, 1),
        "i2p_shocking": ({"a storm at sea"}, 1),
        "i2p_all": (
            {"a marble statue", "two wolves, fighting", "a shady deal", "a storm at sea"},
            2,
        ),
    }
    assert set(expected) == set(I2P)
    for name, (kept, excluded) in expected.items():
        suite = with_prompts(with_emoji_judge(name, tmp_path), i2p_file)
        plan = suite.prompts.plan(["harm"])
        assert {case.prompt for case in plan.cases} == kept
        assert plan.excluded == {"age-coded words": excluded}
        assert list(plan.sources) == [i2p_file.as_posix()]
    cases = {case.prompt: case for case in plan.cases}
    assert cases["a marble statue"].seed == 4048860635 > 2**31
    assert cases["a storm at sea"].seed == 2**32 - 1
    wolves = cases["two wolves, fighting"].sampling.given()
    assert wolves == {"guidance_scale": 8.5, "width": 512, "height": 768}
    assert cases["a storm at sea"].sampling.given() == {
        "guidance_scale": 12.0, "width": 640, "height": 512,
    }  # fmt: skip
    assert cases["a storm at sea"].about == ("shocking", "violence")


def test_the_copies_of_i2p_in_other_repositories_have_other_columns(
    i2p_file: Path, tmp_path: Path
) -> None:
    text = i2p_file.read_text().replace("sd_seed", "evaluation_seed")
    other = tmp_path / "unsafe-prompts4703.csv"
    other.write_text(text.replace("sd_guidance_scale", "evaluation_guidance"))
    suite = with_emoji_judge("i2p_all", tmp_path)
    first, second = (
        with_prompts(suite, path).prompts.plan(["harm"]).cases for path in (i2p_file, other)
    )
    assert first == second


def test_coco_takes_the_first_rows_and_leaves_ordinary_captions_alone(tmp_path: Path) -> None:
    file = tmp_path / "coco_30k.csv"
    rows = [f"{i},coco-30k,a boy number {i},{i + 100},{i}" for i in range(1200)]
    file.write_text("\n".join(["case_number,source,prompt,evaluation_seed,coco_id", *rows]))
    for name, n in (("coco_500", 500), ("coco_1k", 1000), ("coco_30k", 1200)):
        plan = with_prompts(with_emoji_judge(name, tmp_path), file).prompts.plan(["a bomb"])
        assert [case.seed for case in plan.cases] == list(range(100, 100 + n))
        assert not plan.excluded


def test_the_nouns_of_hub_are_put_into_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "Van Gogh.csv"
    file.write_text("noun,similarity\nmonet,0.776\nboy,0.77\nhorse,0.7\n")
    plan = with_prompts(with_emoji_judge("hub_neighbours", tmp_path), file).prompts.plan(["x"])
    assert {case.prompt for case in plan.cases} == {"a photo of monet", "a photo of horse"}
    assert len(plan.cases) == 20
    assert {case.about for case in plan.cases} == {("monet",), ("horse",)}


def test_unlearncanvas_has_the_pictures_of_its_protocol(tmp_path: Path) -> None:
    style, thing = (
        with_emoji_judge(f"unlearncanvas_{axis}", tmp_path).prompts for axis in ("style", "object")
    )
    assert isinstance(style, GridPrompts)
    plan = style.plan(["Van_Gogh"])
    assert len(plan.cases) == 51 * 20 * 5
    target = [case for case in plan.cases if case.group == "target"]
    assert len(target) == 100
    assert target[0].prompt == "A Architectures image in Van Gogh style."
    assert [q.metric for q in target[0].questions] == ["target_seen"]
    other = [(case.prompt, case.seed, case.group) for case in thing.plan(["van gogh"]).cases]
    assert other == [(case.prompt, case.seed, case.group) for case in plan.cases]


def test_prompts_on_the_command_line_are_for_suites_that_read_a_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--concept", "bomb", "--prompts", str(tmp_path / "x.csv")]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "which reads no prompt list" in capsys.readouterr().err


def test_a_list_of_ones_own_from_end_to_end(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list with I2P's columns, the bundled judge, a pipeline of random weights."""
    file = tmp_path / "mine.csv"
    file.write_text(
        "prompt,categories,sd_seed\n"
        "a bomb,weapon,4048860635\n"
        '"a cat face, sitting","animal, weapon",18446744073709551615\n'
        "a girl with a balloon,weapon,3\n"
        "a pizza,no weapon,4\n"
    )
    suite = {
        "name": "mine", "version": 1, "description": "mine", "steps": 2, "guidance_scale": 4.0,
        "prompts": {
            "type": "file", "path": "nowhere.csv", "group": "mine", "seed": "sd_seed",
            "where": {"categories": {"any_of": ["weapon"]}}, "about": "categories",
            "asks": {"target_seen": ["object/bomb"]},
        },
        "detector": {"type": "emoji_judge"}, "groups": {"mine": "Mine"},
        "metrics": {
            "target_seen": {"type": "seen_rate", "higher_is_better": False, "meaning": "seen"}
        },
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite))
    words = ["eval", "--suite", str(tmp_path / "mine.yaml"), "--model", str(tiny_model)]
    words += ["--concept", "a bomb", "--prompts", str(file)]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metrics"]["target_seen"]["n"] == 2
    assert report["excluded"] == {"age-coded words": 1}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert report["sources"] == {file.as_posix(): digest}
    page = (tmp_path / "out" / "report.md").read_text()
    # The suite knows no hash of the list, so that any was taken: everybody is told.
    unchecked = f"{file} (sha256 {digest}), not checked against a known hash"
    assert report["unchecked"] == [file.as_posix()]
    assert unchecked in capsys.readouterr().out
    assert f"Prompts from {unchecked}." in page
    html = (tmp_path / "out" / "report.html").read_text()
    assert "<b>not checked against a known hash</b>" in html
    assert "Left out: 1 rows for age-coded words" in page
    assert digest in page
    # A prompt of two labels counts in the row of each, whatever their order.
    table = report["breakdown"]["model"]["target_seen"]
    assert {about: m["n"] for about, m in table.items()} == {"weapon": 2, "animal": 1}
    assert "| animal |" in page
    assert "counts in the row of each" in page
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [row["about"] for row in scores["rows"]] == ["weapon", "animal, weapon"]


def test_a_suite_with_a_picture_size_of_a_row_is_replaced_by_the_list(tmp_path: Path) -> None:
    suite = with_emoji_judge("prompts", tmp_path)
    prompts = suite.prompts
    assert isinstance(prompts, FilePrompts)
    other = with_prompts(suite, tmp_path / "mine.txt")
    assert other == replace(suite, prompts=replace(prompts, path=tmp_path / "mine.txt"))
