"""`expunge attack` from the command line: files, resuming, and mistakes in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from expunge.backbones import identity
from expunge.cli import main, table_rows
from expunge.errors import UserError
from expunge.eval.attacks.command import AttackConfig, ask, earlier, models, named
from expunge.eval.attacks.paraphrase import Paraphrase
from expunge.eval.claim import claim
from expunge.results import MARKER


@pytest.fixture
def attack(suite_path: Path, lora: Path, pictures: Path):
    def run(output_dir: Path, *argv: object, **options: object) -> int:
        options = {
            "suite": suite_path, "lora": lora, "limit": 1, "store": pictures,
            "attack": "paraphrase", "attack.queries": 2, "attack.at_once": 1,
        } | options  # fmt: skip
        words = [w for k, v in options.items() if v is not None for w in (f"--{k}", v)]
        return main(["attack", *map(str, [*words, *argv, "--output_dir", output_dir])])

    return run


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "attack.json").read_text())
    return found


def stable(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k != "provenance"}


def test_it_leaves_a_report_a_sheet_and_a_table(attack, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert attack(out) == 0
    printed = capsys.readouterr().out
    assert "paraphrase (black box), 1 cases (smoke run, not comparable)" in printed
    assert "erased, attacked" in printed
    found = report(out)
    assert found["schema_version"] == 1
    assert found["attack"]["type"] == "paraphrase"
    assert found["attack"]["queries"] == 2
    assert (found["access"], found["smoke"], found["n"]) == ("black box", True, 1)
    assert found["concept"] == {"texts": ["a bomb"], "labels": ["object/bomb"]}
    assert set(found["results"]) == {"base", "pre_asr", "asr"}
    for m in found["results"].values():
        assert 0 <= m["low"] <= m["value"] <= m["high"] <= 1
    assert found["results"]["base"]["value"] == 1
    assert found["results"]["pre_asr"]["value"] == 0
    (row,) = found["rows"]
    assert {"prompt", "seed", "before", "after", "adversarial", "trials"} <= set(row)
    assert found["cost"]["pictures"] == len(row["trials"])
    assert found["cost"]["unet_passes"] == 8 * len(row["trials"])
    assert found["best_of"][-1]["value"] == found["results"]["asr"]["value"]
    assert set(found["generators"]) == {"erased", "base"}
    assert found["models"] == dict.fromkeys(("erased", "base"), identity("emoji"))
    assert found["generators"]["base"]["adapters"] == []
    assert len(found["generators"]["erased"]["adapters"]) == 1
    assert found["provenance"]["seconds"] >= 0
    with Image.open(out / "attack.png") as sheet:
        assert sheet.height > 3 * 128
    again = (out / "attack.json").stat().st_mtime_ns
    assert attack(out) == 0
    assert stable(report(out)) == stable(found)
    assert (out / "attack.json").stat().st_mtime_ns != again


def test_another_attack_does_not_write_over_it(attack, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert attack(out) == 0
    before = (out / "attack.json").read_bytes()
    capsys.readouterr()
    assert attack(out, **{"attack.queries": 3}) == 2
    assert "an attack with another attack" in capsys.readouterr().err
    assert attack(out, seed=1) == 2
    assert "another seed" in capsys.readouterr().err
    assert (out / "attack.json").read_bytes() == before
    assert attack(out, "--overwrite", "true", seed=1) == 0
    assert report(out)["seed"] == 1


def test_without_a_lora_everything_succeeds_by_itself(attack, tmp_path) -> None:
    assert attack(tmp_path / "out", lora=None, concept="a bomb") == 0
    found = report(tmp_path / "out")
    assert found["results"]["pre_asr"]["value"] == found["results"]["asr"]["value"] == 1.0
    assert found["attacked"] == found["cost"]["pictures"] == 0
    assert found["best_of"] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attack": "p5d", "attack.queries": None, "attack.at_once": None}, "did you mean p4d?"),
        ({"attack.queris": 2}, "queries"),
        ({"attack.queries": 0}, "got queries 0"),
        ({"lora": None}, "got neither --concept nor --lora"),
        ({"concept": "a zeppelin"}, "zeppelin"),
        ({"group": "pairs"}, "among target"),
        ({"at_once": 0}, "got at_once 0"),
        ({"batch_size": 0}, "got batch_size 0"),
        ({"suite": "emojy"}, "emoji"),
        ({"lora": "nowhere"}, "does not exist"),
        ({"limit": 0}, "got limit 0"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(attack, tmp_path, capsys, options, said) -> None:
    assert attack(tmp_path / "out", **options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["concept_inversion", "ring_a_bell", "relearning"])
def test_what_learns_of_one_concept_refuses_several(attack, tmp_path, capsys, name) -> None:
    told = {"attack": name, "attack.queries": None, "attack.at_once": None, "limit": 2}
    assert attack(tmp_path / "out", "--concept", "a bomb", "--concept", "a key", **told) == 2
    error = capsys.readouterr().err
    assert "got 2 concepts, a bomb, a key, for an attack that learns of one" in error
    assert "say --concept 'a bomb'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_names_and_members_of_one_concept_are_one(quick) -> None:
    from expunge.eval.attacks import ATTACKS
    from expunge.eval.attacks.command import _require_one

    for texts in (["a bomb", "bomb"], ["a weapon"]):
        plan = quick.prompts.plan(texts)
        _require_one(ATTACKS.load("relearning")(), plan, plan.cases)


def test_several_concepts_are_attacked_case_by_case(attack, tmp_path) -> None:
    assert attack(tmp_path / "out", "--concept", "a bomb", "--concept", "a key", limit=2) == 0
    told = [row["prompt"] for row in report(tmp_path / "out")["rows"]]
    assert ["a bomb" in told[0], "a key" in told[1]] == [True, True]


def test_a_folder_of_something_else_is_refused(attack, tmp_path, capsys) -> None:
    (tmp_path / ".expunge").touch()
    (tmp_path / "report.json").write_text("{}")
    for more in ([], ["--overwrite", "true"]):
        assert attack(tmp_path, *more) == 2
        assert "results that are no attack" in capsys.readouterr().err
    assert (tmp_path / "report.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{}]}'])
def test_a_broken_report_is_one_mistake(suite_path, tmp_path, text) -> None:
    config = AttackConfig(
        output_dir=tmp_path, suite=str(suite_path), concept=["a bomb"], limit=1, attack=Paraphrase()
    )
    (tmp_path / MARKER).touch()
    claim(tmp_path, ask(config).settings, "attack", "base", {})
    (tmp_path / "attack.json").write_text(text)
    with pytest.raises(UserError, match=r"attack.json, which cannot be read"):
        earlier(config)


def test_a_model_whose_files_changed_is_another(suite_path, tmp_path) -> None:
    weights = tmp_path / "model" / "unet.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    (weights.parent / "model_index.json").touch()
    out = tmp_path / "out"
    config = AttackConfig(
        output_dir=out, suite=str(suite_path), concept=["a bomb"], limit=1, attack=Paraphrase(),
        model=str(weights.parent),
    )  # fmt: skip
    out.mkdir()
    (out / MARKER).touch()
    claim(out, ask(config).settings, "attack", "base", {})
    (out / "attack.json").write_text(json.dumps({"rows": [], "models": models(config)}))
    assert earlier(config)["rows"] == []
    weights.write_bytes(b"other")
    with pytest.raises(UserError, match="an attack of another model"):
        earlier(config)


def test_sdxl_is_refused_by_attacks_on_tokens() -> None:
    from types import SimpleNamespace

    from expunge.eval.attacks.white_box import require_one_encoder

    two = SimpleNamespace(text_encoder=1, tokenizer=1, text_encoder_2=2, tokenizer_2=2)
    with pytest.raises(UserError, match="2 text encoders"):
        require_one_encoder(two, "p4d")


def test_the_attacks_are_listed() -> None:
    assert "relearning" in table_rows("attacks")
    assert "emoji_attack" in table_rows("suites")


def test_a_concept_is_known_by_all_its_names() -> None:
    concept = named(("a weapon",), ("object/axe", "object/palm tree"))
    assert concept.targets[0] == "a weapon"
    assert concept.replaced("an axe in ink style", "<x>") == "<x> in ink style"
    assert concept.replaced("sticker drawing of the palm tree", "<x>") == "sticker drawing of <x>"
    assert concept.replaced("an axeman", "<x>") == "an axeman"
