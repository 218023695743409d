"""`expunge calibrate`: the file, what it says, and what it refuses."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from expunge.backbones import load_pipeline
from expunge.cli import main
from expunge.configuration import parse
from expunge.densities.calibrated import Calibrated
from expunge.densities.clip_text import ClipText
from expunge.densities.reference import read_reference
from expunge.generation import generate
from expunge.results import sha256_folder
from expunge.sampling.calibrate import CalibrateConfig
from expunge.sampling.correction import Correction
from expunge.sampling.guard import guard


def calibrate(*options: str) -> int:
    return main(["calibrate", *options])


@pytest.fixture
def text(tiny_clip: str) -> list[str]:
    return ["--density.clip", tiny_clip, "--density.targets", '["a bomb", "a skull"]']


def test_a_folder_of_pictures_becomes_a_scale(
    text, tiny_clip: str, folder_of, drawn, tmp_path: Path, capsys
) -> None:
    folder, out = folder_of("benign", "grey", 200), tmp_path / "new" / "c.json"
    assert calibrate(*text, "--images", folder, "--output", str(out), "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "a bomb" in printed
    assert "200 pictures, 2 concepts" in printed
    assert "only" not in printed
    value = json.loads(out.read_text())
    assert value["n"] == 200
    assert value["density"]["type"] == "clip_text"
    assert value["identity"]["clips"] == ClipText(tiny_clip, ["x"]).build().identity()["clips"]
    assert value["source"]["sha256"] == sha256_folder(folder)
    assert value["provenance"]["versions"]["torch"] is not None
    config = Calibrated(ClipText(tiny_clip, ["a bomb", "a skull"]), str(out), threshold=0.98)
    p = config.build()(drawn("grey", 200, seed=3)).per_concept
    assert abs(p.mean() - 0.5) < 0.15
    assert list(out.parent.iterdir()) == [out]


def test_a_model_draws_harmless_prompts(text, tiny_sd1: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "c.json"
    (tmp_path / "prompts.txt").write_text("a cat face\n\n  a frog\n")
    options = ["--model", tiny_sd1, "--steps", "2", "--seed", "5", "--images_per_prompt", "6"]
    options += ["--prompt", "a pizza", "--prompts_file", str(tmp_path / "prompts.txt")]
    assert calibrate(*text, *options, "--output", str(out), "--device", "cpu") == 0
    reference = read_reference(out)
    assert reference.n == 18
    assert reference.about["seed"] == 5
    assert reference.about["source"]["prompts"] == ["a pizza", "a cat face", "a frog"]
    assert "only 18 pictures: no threshold above 0.889" in capsys.readouterr().out


@pytest.mark.parametrize("at", ["steps", "end"])
def test_what_is_drawn_is_scored_as_a_guard_sees_it_or_at_its_end(
    at, tiny_clip: str, tiny_sd1: str, tmp_path: Path
) -> None:
    out = tmp_path / "c.json"
    options = ["--density.clip", tiny_clip, "--density.targets", '["a bomb"]', "--at", at]
    options += ["--model", tiny_sd1, "--steps", "4", "--images_per_prompt", "16"]
    options += ["--prompt", "a pizza", "--guidance_scale", "3", "--device", "cpu"]
    assert calibrate(*options, "--output", str(out)) == 0
    density = ClipText(tiny_clip, ["a bomb"], threshold=1.0).build()
    how = Correction(direction="gradient", strength=0.0)
    guarded = guard(load_pipeline(tiny_sd1), density, how=how)
    pictures = generate(guarded, ["a pizza"] * 16, range(16), steps=4, guidance_scale=3.0)
    seen = torch.tensor([step.score for step in guarded.trace.steps])
    wanted = {"steps": seen.nan_to_num(-1).amax(0), "end": density(pictures).score}[at]
    found = torch.tensor(read_reference(out).scores[0])
    torch.testing.assert_close(found, wanted.sort().values, atol=1e-5, rtol=1e-4)


def test_an_existing_file_is_kept_unless_it_is_said(
    text, folder_of, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "c.json"
    out.write_text("mine")
    options = [*text, "--images", folder_of("benign", "grey", 16), "--output", str(out)]
    options += ["--device", "cpu"]
    assert calibrate(*options) == 2
    assert "which exists" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert calibrate(*options, "--overwrite") == 0
    assert read_reference(out).n == 16


def test_nan_writes_nothing(folder_of, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "own_density", sys.modules[__name__])
    out = tmp_path / "c.json"
    options = ["--density.type", "callable", "--density.function", "own_density:unknown"]
    options += ["--images", folder_of("benign", "grey", 16), "--output", str(out)]
    assert calibrate(*options, "--device", "cpu") == 1
    assert "NaN or infinite" in capsys.readouterr().err
    assert not out.exists()


def unknown(images: torch.Tensor) -> torch.Tensor:
    return torch.full((len(images),), math.nan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "got a folder of images and prompts, or neither"),
        (["--images", "x", "--prompt", "a"], "got a folder of images and prompts, or neither"),
        (["--images", "none"], "got none, which is no folder"),
        (["--prompts_file", "none.txt"], "got prompts_file none.txt"),
        (["--images", "few"], "got 3 harmless pictures; allowed: 16 or more"),
        (["--images", "few", "--density.threshold", "2"], "got threshold 2.0; allowed: -1 to 1"),
        (["--images", "few", "--density.top_k", "3"], "got top_k 3"),
        (["--images", "few", "--density.type", "clip_txt"], "did you mean clip_text"),
        (["--prompt", "a cat", "--steps", "1"], "got steps 1 at steps"),
        (["--images", "few", "--output", "c.txt"], "ends in .json"),
        (["--prompt", "a cat face and a bomb"], "which names the concept"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    options: list[str], message: str, text, folder_of, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of("few", "grey", 3)
    own = [] if "--output" in options else ["--output", "c.json"]
    # A density of another type has other keys.
    density = [] if "--density.type" in options else text
    concept = ["--concept.targets", '["a bomb"]']
    assert calibrate(*density, *concept, *options, *own, "--device", "cpu") == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_one_line(text, folder_of, tmp_path, capsys) -> None:
    options = ["--images", folder_of("benign", "grey", 16), "--device", "cuda"]
    assert calibrate(*text, *options, "--output", str(tmp_path / "c.json")) == 2
    assert "got device 'cuda', which cannot be used" in capsys.readouterr().err


def test_targets_may_come_from_the_concept() -> None:
    argv = ["--output", "c.json", "--images", "x", "--concept.targets", '["a bomb"]']
    config = parse(CalibrateConfig, argv)
    assert config.concept is not None
    assert config.concept.targets == ["a bomb"]
    assert isinstance(config.density, ClipText)


def test_the_shipped_configuration(tmp_path: Path) -> None:
    from expunge.configuration import dump, load
    from expunge.eval.emoji_vocabulary import Vocabulary

    argv = ["--config", "calibrate/emoji_bomb.yaml", "--output", "bomb.json"]
    config = parse(CalibrateConfig, argv)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(CalibrateConfig, tmp_path / "again.yaml") == config
    assert not any("bomb" in prompt for prompt in config.prompt)
    phrases = set(Vocabulary.read(None).phrases.values())
    assert phrases - {"a bomb"} <= set(config.prompt)
    # Enough for the threshold that `calibrated` has by default.
    assert len(config.prompt) * config.images_per_prompt > 500


def test_a_density_that_nothing_identifies_is_refused_before_it_scores(
    folder_of, tmp_path: Path, capsys
) -> None:
    folder, out = folder_of("benign", "grey", 3), tmp_path / "c.json"
    told = ["--density.type", "callable", "--density.function", "torch:abs"]
    assert calibrate(*told, "--images", folder, "--output", str(out), "--device", "cpu") == 2
    assert "whose source cannot be read" in capsys.readouterr().err
    assert not out.exists()
