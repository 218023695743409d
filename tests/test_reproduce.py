"""The scripts that reproduce the thesis and the table of samplers, each run once, small."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import forked
from expunge.clip import load_clip
from expunge.configuration import dump, load
from expunge.errors import UserError
from expunge.eval.production import to_tensor
from expunge.eval.store import ImageStore
from expunge.eval.suite import load_suite
from expunge.results import sha256_file
from expunge.train.config import TrainConfig

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "reproduce"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    return forked.run([sys.executable, SCRIPTS / script, *arguments])


@pytest.fixture
def quick(tmp_path):
    """A shipped suite with four denoising steps, as a file."""

    def write(name: str) -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(dump(replace(load_suite(name), steps=4)))
        return file

    return write


def test_a_sweep_of_the_thesis_leaves_tables_and_a_figure(tmp_path, quick) -> None:
    done = run(
        "thesis.py", "--experiment", "strength", "--values", "[0, 300]", "--limit", "1",
        "--suite", quick("emoji"), "--threads", "1", "--output_dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "strength.json").read_text())["rows"]
    assert list(rows) == ["γ = 0", "γ = 300"]
    assert rows["γ = 0"]["n"] == 5
    # Without strength nothing happens; with it the bombs change, and so the distance to plain.
    assert rows["γ = 0"]["kid"] == pytest.approx(0, abs=1e-9)
    assert rows["γ = 300"]["kid"] != pytest.approx(0, abs=1e-4)
    tables = (tmp_path / "strength.md").read_text()
    assert tables.count("| plain |") == tables.count("| γ = 300 |") == 2
    assert "| 5 |" in tables
    assert (tmp_path / "strength.png").read_bytes()[:4] == b"\x89PNG"


def test_several_concepts_at_once(tmp_path, quick) -> None:
    done = run(
        "thesis.py", "--experiment", "multi", "--concept", "a bomb", "--concept", "a sword",
        "--limit", "1", "--suite", quick("emoji"), "--threads", "1", "--output_dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "multi-0" / "report.json").read_text())
    assert report["concept"]["texts"] == ["a bomb", "a sword"]
    assert report["generators"]["erased"]["sampler"]["density"]["top_k"] == 1
    assert "| Multi |" in (tmp_path / "multi.md").read_text()


def test_all_experiments_of_the_thesis_are_rows_of_its_two_tables(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from thesis import EXPERIMENTS, Config, points, tables

    config = Config(output_dir=tmp_path)
    labels = [label for name in EXPERIMENTS for label in points(config, name)]
    assert len(set(labels)) == len(labels) == 16
    assert {"Single", "SD-filter", "Multi", "η = 0.2", "γ = 300", "K = 4"} <= set(labels)

    def measured(value, **more):
        found = {"value": value, "low": value, "high": value, "unknown": 0, "unit": "share"}
        return found | {"higher_is_better": False} | more

    def found(base, kid):
        metrics = {
            "seen": measured(None, unknown=3),
            "fid": measured(17.25, unit="number"),
            "kept": measured(0.5, higher_is_better=True),
        }
        told = {"benign_changed": None, "kid": kid, "clip_score": kid, "unknown": 1, "n": 7}
        return {"metrics": metrics, "base": metrics | {"seen": measured(base)}} | told

    rows = {"Single": found(1.0, None), "K = 1": found(1.0, 0.25), "Multi": found(0.5, 0.5)}
    safety, quality = tables(rows).split("\n\n")
    # Plain sampling of one concept once, and of several, which has other prompts.
    assert [line.split(" |")[0] for line in safety.splitlines()[2:]] == [
        "| plain", "| Single", "| K = 1", "| plain", "| Multi",
    ]  # fmt: skip
    assert "| Single | – (3 unknown) | 7 |" in safety
    assert "| quality | fid, lower is better | kept | benign changed |" in quality
    assert (
        "| Single | 17.25 [17.25, 17.25] | 50.0 % [50.0, 50.0] | – | – (1 unknown) | – |" in quality
    )
    assert (
        "| K = 1 | 17.25 [17.25, 17.25] | 50.0 % [50.0, 50.0] | – | 250.00 (1 unknown) |" in quality
    )


def test_the_thesis_on_another_model_with_a_list_of_two_sizes(
    tmp_path, tiny_sd1, tiny_clip, quick
) -> None:
    prompts = tmp_path / "mine.csv"
    prompts.write_text("prompt,height,width\na bomb,16,16\na key,24,16\na bomb and a key,,\n")
    suite = quick("emoji")
    table = yaml.safe_load(suite.read_text()) | {"steps": 2, "groups": {"harmful": "Mine"}}
    table["prompts"] = {
        "type": "file", "path": "nowhere.csv", "group": "harmful", "height": "height",
        "width": "width", "asks": {"target_seen": ["object/bomb"]},
    }  # fmt: skip
    table["metrics"] = {"target_seen": table["metrics"]["target_seen"]}
    suite.write_text(yaml.safe_dump(table))
    done = run(
        "thesis.py", "--experiment", "single", "--model", tiny_sd1, "--clip", tiny_clip,
        "--threshold", "-1", "--suite", suite, "--prompts", prompts, "--concept", "a bomb",
        "--threads", "1", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads((tmp_path / "out" / "single.json").read_text())["rows"]["Single"]
    assert (row["n"], row["unknown"]) == (3, 0)
    assert row["kid"] is not None
    report = json.loads((tmp_path / "out" / "single-0" / "report.json").read_text())
    assert report["unchecked"] == [prompts.as_posix()]
    assert "| Single |" in (tmp_path / "out" / "single.md").read_text()


def test_pictures_of_several_sizes_and_those_that_cannot_be_read(
    monkeypatch, tmp_path, tiny_clip
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from measure import distance

    store, numbers = ImageStore(tmp_path), np.random.default_rng(0)
    for i, side in enumerate((16, 24, 16, 24)):
        for name in ("a", "b"):
            store.write(f"{name}{i}", numbers.integers(0, 256, (side, 16, 3), np.uint8), "", 0)
    ours, base = ([f"{name}{i}" for i in range(4)] for name in "ab")
    texts, eye = ["a bomb", "a key", "a bell", "a sun"], load_clip(tiny_clip)

    def mean(images):
        return images.mean((2, 3))

    found = distance(ours, base, texts, store, mean, eye)
    assert found["unknown"] == 0
    with torch.no_grad():
        alone = [
            float(eye.encode_images(to_tensor([store.read(key)])) @ eye.encode_texts([text])[0])
            for key, text in zip(ours, texts, strict=True)
        ]
    assert found["clip_score"] == pytest.approx(np.mean(alone), abs=1e-6)
    assert distance(ours, ours, texts, store, mean, eye)["kid"] == pytest.approx(0, abs=1e-9)
    # What is NaN is not there, and costs only itself and its pair.
    store.path(base[1]).unlink()
    left = distance(ours, base, texts, store, mean, eye)
    assert left["unknown"] == 1
    some = [[keys[i] for i in (0, 2, 3)] for keys in (ours, base, texts)]
    assert left == pytest.approx(distance(*some, store, mean, eye) | {"unknown": 1}, abs=1e-6)
    for key in (*ours[1:], *base[2:]):
        store.path(key).unlink()
    assert distance(ours, base, texts, store, mean, eye) | {"clip_score": None} == {
        "kid": None, "clip_score": None, "unknown": 3,
    }  # fmt: skip


def test_the_table_of_samplers(tmp_path, quick) -> None:
    done = run(
        "emoji_samplers.py", "--only", "negative prompt", "--limit", "2", "--rounds", "1",
        "--suite", quick("emoji_implied"), "--concept", "a skull", "--threads", "1",
        "--output_dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads((tmp_path / "table.json").read_text())["rows"]["negative prompt"]
    assert row["n"] == 2
    assert row["cost"] > 0
    assert "| negative prompt |" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_the_table_of_erasure_pools_concepts_and_goes_on_where_it_was(tmp_path) -> None:
    arguments = ("--only", "UCE", "--concepts", "bomb; ink", "--limit", "1")
    done = run("erasure_table.py", *arguments, "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    cells = json.loads((tmp_path / "table.json").read_text())["cells"]
    assert list(cells) == ["UCE/bomb/0", "UCE/ink/0"]
    assert cells["UCE/bomb/0"]["metrics"]["target_seen"]["n"] == 1
    assert cells["UCE/bomb/0"]["forwards"] == 0
    pooled, each = (tmp_path / "table.md").read_text().split("\n\n")
    assert pooled.count("| UCE |") == 1
    assert each.count("| UCE |") == 2
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}
    assert len(before) >= 2
    more = ("--only", "density; UCE", "--limit", "1", "--present", "true")
    assert run("erasure_table.py", *more, "--output_dir", str(tmp_path)).returncode == 0
    assert json.loads((tmp_path / "table.json").read_text())["cells"].keys() == cells.keys()
    for bad, said in (
        (("--only", "ESD", "--present", "true"), "no cell that is there"),
        (("--only", "UCE", "--concepts", "ink"), "other settings than today's"),
    ):
        if "ink" in bad:
            file = tmp_path / "UCE" / "ink" / "0" / "config.yaml"
            file.write_text(file.read_text().replace("rank: 32", "rank: 31"))
        done = run("erasure_table.py", *bad, "--limit", "1", "--output_dir", str(tmp_path))
        assert done.returncode == 2
        assert said in done.stderr
    assert before == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}


@pytest.mark.slow
def test_adapters_trained_apart_are_put_together_beside_one_for_all(tmp_path) -> None:
    done = run(
        "several.py", "--only", "the three together; one training, balanced", "--seeds", "1",
        "--limit", "1", "--steps", "2", "--refresh", "1", "--rollouts", "4", "--output_dir",
        str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "reports/the_three_together/0/report.json").read_text())
    loras = [tmp_path / name / "0" for name in ("a_bomb", "a_cigarette", "a_skull")]
    hashes = [sha256_file(folder / "pytorch_lora_weights.safetensors") for folder in loras]
    assert [x["sha256"] for x in report["generators"]["erased"]["adapters"]] == hashes
    text = (tmp_path / "table.md").read_text()
    assert text.count("| the three together |") == text.count("| one training, balanced |") == 1
    cells = json.loads((tmp_path / "table.json").read_text())["cells"]
    assert sum(map(len, cells["the three together/0"]["seen"].values())) == 1
    made_of = load(TrainConfig, tmp_path / "one_training_balanced" / "0" / "config.yaml")
    assert made_of.several.order == "balanced"
    assert len(made_of.concept.targets) == 3
    assert made_of.latents.refresh == 1
    alone = load(TrainConfig, tmp_path / "a_bomb" / "0" / "config.yaml")
    assert alone.latents.refresh == 1000


@pytest.mark.slow
def test_the_gate_and_the_gradient_are_targets_of_one_recipe(tmp_path) -> None:
    done = run(
        "gates.py", "--only", "gradient, gate", "--limit", "1", "--steps", "1", "--output_dir",
        str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| gradient, gate |" in (tmp_path / "table.md").read_text()
    told = load(TrainConfig, tmp_path / "gradient_gate" / "config.yaml")
    assert (told.objective.direction, told.objective.density.threshold) == ("gradient", 0.1)


def test_the_table_of_attacks_goes_on_where_it_was(tmp_path, lora_of_nothing) -> None:
    arguments = (
        "--methods", json.dumps({"none, n/a": str(lora_of_nothing)}), "--only", "paraphrase",
        "--output_dir", str(tmp_path / "out"), "--limit",
    )  # fmt: skip
    done = run("attack_table.py", *arguments, "1")
    assert done.returncode == 0, done.stderr[-2000:]
    cells = json.loads((tmp_path / "out" / "table.json").read_text())["cells"]
    assert list(cells) == ["none, n/a/paraphrase"]
    assert cells["none, n/a/paraphrase"]["results"]["asr"]["value"] == 1.0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| method | base | pre-ASR | paraphrase |" in text
    assert text.count("| none, n/a |") == 2
    file = tmp_path / "out" / "none_n" / "a" / "paraphrase" / "attack.json"
    before = file.stat().st_mtime_ns
    assert run("attack_table.py", *arguments, "1", "--present", "true").returncode == 0
    assert file.stat().st_mtime_ns == before
    for other, said in ((("1", "--budget", "published"), "attack"), (("2",), "cases")):
        done = run("attack_table.py", *arguments, *other)
        assert done.returncode == 2
        assert f"holds an attack with another {said}" in done.stderr
    weights = lora_of_nothing / "pytorch_lora_weights.safetensors"
    with safe_open(weights, "pt") as opened:
        about = opened.metadata()
    save_file({k: 2 * v for k, v in load_file(weights).items()}, weights, about)
    done = run("attack_table.py", *arguments, "1", "--present", "true")
    assert done.returncode == 2
    assert "holds an attack with another adapters" in done.stderr


def test_a_part_of_a_table_leaves_its_other_cells(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from tables import fill, markdown

    def table(cells):
        return markdown(["cell", "n"], [[name, str(x["n"])] for name, x in cells.items()])

    def run(limit, **n):
        jobs = {name: lambda value=value: {"n": value} for name, value in n.items()}
        return fill(jobs, tmp_path / "table", table, limit=limit)

    run(1, uce=1, esd=2)
    assert run(1, uce=3, spm=4) == {"uce": {"n": 3}, "esd": {"n": 2}, "spm": {"n": 4}}
    found = json.loads((tmp_path / "table.json").read_text())
    assert (list(found["cells"]), found["limit"]) == (["uce", "esd", "spm"], 1)
    before = (tmp_path / "table.md").read_bytes()
    assert before.decode().splitlines()[2:] == ["| uce | 3 |", "| esd | 2 |", "| spm | 4 |"]
    with pytest.raises(UserError, match="other settings than today's"):
        run(2, uce=5)
    assert (tmp_path / "table.md").read_bytes() == before
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        run(1, uce=5)


def test_as_many_latents_at_random_are_others_with_every_seed(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import coreset

    drawn, at_random = [], coreset.at_random

    def spy(g, size, **more):
        drawn.append(at_random(g, size, **more))
        return drawn[-1]

    monkeypatch.setattr(coreset, "at_random", spy)
    config = coreset.Config(output_dir=tmp_path, steps=1, rollouts=4)
    for seed in (0, 1):
        lora = coreset.erased(config, "random", 3, seed)
        assert (lora / "pytorch_lora_weights.safetensors").is_file()
    assert [int((w > 0).sum()) for w in drawn] == [3, 3]
    assert len(drawn[0]) == len(drawn[1])
    assert not drawn[0].equal(drawn[1])


def test_relearning_that_could_not_be_judged_did_not_resist(monkeypatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from attack_table import asr

    def found(after, unknown):
        told = {"type": "relearning", "checkpoints": [2]}
        return {"attack": told, "findings": {"back after": after, "curve": [{"unknown": unknown}]}}

    assert asr(found(2, 0)) == "2 steps"
    assert asr(found(None, 0)) == "> 2 steps"
    assert asr(found(None, 3)) == "> 2 steps (3 unknown)"
    assert asr(found("unknown", 4)) == "unknown (4 unknown)"


@pytest.fixture
def lora_of_nothing(tmp_path):
    """A LoRA that is active and erases nothing to speak of."""
    import torch

    from expunge import adapters, backbones

    pipeline = backbones.load_pipeline("emoji")
    modules = backbones.modules_of(pipeline.unet, "x-strict")
    parameters = adapters.attach(pipeline.unet, modules, rank=1, alpha=1, seed=0)
    for p in parameters:
        if not p.any():
            p.data = torch.full_like(p, 1e-6)
    (tmp_path / "lora").mkdir()
    adapters.save(pipeline, tmp_path / "lora", {"concept": {"targets": ["a bomb"]}})
    return tmp_path / "lora"


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("attack_table.py", ["--methods", "{x: y}", "--only", "magic"], "allowed: concept"),
        ("erasure_table.py", ["--only", "magic"], "allowed: density"),
        ("erasure_table.py", ["--concepts", "zeppelin"], "allowed: bomb"),
        ("thesis.py", ["--experiment", "singel"], "allowed: all or single"),
        ("thesis.py", ["--experiment", "k", "--values", "[9]"], "top_k"),
        ("thesis.py", ["--experiment", "single", "--values", "[9]"], "threshold, strength, k"),
        ("thesis.py", ["--model", "x/y", "--suite", "i2p_sexual"], "say --concept"),
        ("thesis.py", ["--model", "x/y", "--concept", "nudity"], "--prompts or both"),
        ("emoji_samplers.py", ["--only", "magic"], "allowed: safe"),
    ],
)
def test_mistakes_are_one_line(tmp_path, script, arguments, said) -> None:
    done = run(script, *arguments, "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_control_of_latent_inversion_compares_the_concept_with_what_no_model_draws(
    tmp_path,
) -> None:
    done = run(
        "inversion_control.py", "--output_dir", str(tmp_path / "out"),
        "--methods", "{base: null}", "--pictures", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = found["rows"]
    assert list(rows) == ["base, the concept", "base, what no model draws"]
    concept, alien = rows.values()
    # Its own picture starts at a noise that is likely, the other at one that nobody draws.
    assert concept["variance"] < 1.3 < alien["variance"]
    for row in rows.values():
        for how in ("found", "typical"):
            assert row[how]["distance"]["value"] > 0
            assert row[how]["nearest"]["n"] == 2
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert (tmp_path / "out" / "table.md").read_text().count("| base, ") == 2
