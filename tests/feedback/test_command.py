"""`expunge feedback`: from labels, or from the page, to files that erase; mistakes in one line."""

import contextlib
import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from expunge.cli import main
from expunge.clip import load_clip
from expunge.configuration import load, parse
from expunge.densities.clip_head import ClipHead
from expunge.feedback.command import DERIVED, FeedbackConfig
from expunge.results import sha256_file
from expunge.train.config import TrainConfig
from expunge.train.objectives.hfi import Hfi
from forked import Forked

QUICK = ["--inversion.steps", "2", "--inversion.batch_size", "2", "--sampling_steps", "1"]


@pytest.fixture
def arguments(labelled: Path, tiny_sd1: str, tiny_clip: str, tmp_path: Path) -> list[str]:
    return [
        "feedback", "--labels", str(labelled), "--name", "red", "--model", tiny_sd1,
        "--clip", tiny_clip, "--output_dir", str(tmp_path / "out"), *QUICK,
    ]  # fmt: skip


def refused(capfd, arguments: list[str]) -> str:
    """The one line with which the command refuses its input."""
    assert main(arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    return line


def test_labels_become_everything_that_is_promised(
    arguments, tiny_sd1, tiny_clip, tmp_path, capfd
) -> None:
    out = tmp_path / "out"
    assert main(arguments) == 0
    assert {item.name for item in out.iterdir()} == {".expunge", *DERIVED}
    result = json.loads((out / "feedback.json").read_text())
    accuracy = result["reward"]["accuracy"]
    assert accuracy["n"] == 11
    assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
    assert result["labels"]["yes"] == 5
    assert result["labels"]["no"] == 6
    assert result["drawn"]["seen"]["n"] == 16
    assert "no independent judge" in result["drawn"]["by"]
    for name, digest in result["sha256"].items():
        assert digest == sha256_file(out / name)
    plain = DiffusionPipeline.from_pretrained(tiny_sd1)
    plain.load_textual_inversion(str(out), weight_name="tokens.safetensors")
    assert plain.tokenizer.tokenize("a <red>")[-1] == "<red>"
    reward = ClipHead(str(out / "reward.safetensors")).build()
    assert reward.clip.sha256 == load_clip(tiny_clip).sha256
    assert list(reward.names) == ["red"]
    recipe = parse(TrainConfig, ["--config", str(out / "train.yaml"), "--output_dir", "x"])
    assert recipe.concept.targets == ["<red>"]
    assert recipe.concept.tokens == [str(out / "tokens.safetensors")]
    assert isinstance(recipe.objective, Hfi)
    assert (recipe.latents.times, recipe.latents.beta) == ("beta", (3.0, 3.0))
    assert f"expunge train --config {out / 'train.yaml'}" in capfd.readouterr().out


def test_it_repeats(arguments, tmp_path) -> None:
    tokens = []
    for name in ("a", "b"):
        again = [
            str(tmp_path / name) if part == str(tmp_path / "out") else part for part in arguments
        ]
        assert main(again) == 0
        tokens.append((tmp_path / name / "tokens.safetensors").read_bytes())
    assert tokens[0] == tokens[1]


def test_the_token_can_be_erased_and_drawn(arguments, tmp_path, capfd) -> None:
    """The configuration that was written trains; the LoRA outlives the file of the token."""
    out = tmp_path / "out"
    assert main(arguments) == 0
    quick = ["--steps", "1", "--latents.steps", "2", "--latents.rollouts", "1"]
    quick += ["--validation.steps", "1", "--validation.seeds", "1"]
    recipe = ["--config", str(out / "train.yaml"), "--output_dir", str(tmp_path / "lora")]
    assert main(["train", *recipe, *quick]) == 0
    model = ["--model", arguments[arguments.index("--model") + 1]]
    sample = ["sample", *model, "--lora", str(tmp_path / "lora"), "--steps", "1"]
    sample += ["--images_per_prompt", "1", "--prompt", "a <red>"]
    tokens = ["--tokens", str(out / "tokens.safetensors")]
    assert main([*sample, *tokens, "--output_dir", str(tmp_path / "drawn")]) == 0
    capfd.readouterr()
    line = refused(capfd, [*sample, "--output_dir", str(tmp_path / "refused")])
    assert "got <red> in 'a <red>', a token that this model does not have" in line
    assert not (tmp_path / "refused").exists()
    (out / "tokens.safetensors").rename(tmp_path / "moved.safetensors")
    known = [part if part != "a <red>" else "a key" for part in sample]
    assert main([*known, "--output_dir", str(tmp_path / "known")]) == 0
    again = ["train", *recipe[:2], "--output_dir", str(tmp_path / "again"), *quick]
    capfd.readouterr()
    assert "tokens.safetensors, which do not exist" in refused(capfd, again)


def test_results_are_kept_and_labels_always(arguments, tmp_path, capfd) -> None:
    out = tmp_path / "out"
    assert main(arguments) == 0
    (out / "labels.csv").write_text("file,label\n")
    before = (out / "tokens.safetensors").read_bytes()
    capfd.readouterr()
    assert "already holds results" in refused(capfd, [*arguments, "--seed", "1"])
    assert (out / "tokens.safetensors").read_bytes() == before
    assert main([*arguments, "--seed", "1", "--overwrite", "true"]) == 0
    assert (out / "tokens.safetensors").read_bytes() != before
    assert (out / "labels.csv").read_text() == "file,label\n"


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (["--labels", "nowhere"], "nowhere, which does not exist"),
        (["--name", "Red Thing"], "got name 'Red Thing'"),
        (["--model", "nowhere"], "got model 'nowhere'"),
        (["--clip", "nowhere"], "got unknown CLIP 'nowhere'"),
        (["--inversion.initial", " "], "one word or more"),
        (["--prompt", "a bomb"], "neither or both of labels and pictures"),
        (["--page", "true"], "a folder, and page"),
        (["--images_per_prompt", "0"], "got images_per_prompt 0; allowed: 1 or more"),
        (["--sampling_steps", "0"], "got sampling_steps 0; allowed: 1 to 1000"),
        (["--sampling_steps", "1001"], "got sampling_steps 1001; allowed: 1 to 1000"),
        (["--seed", "9" * 20], "allowed: 0 to 2⁶³"),
        (["--seed", "-1"], "got seed -1"),
        (["--inversion.templates", '["{}", "a{}"]', "--inversion.vectors", "32"], "34 tokens"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, extra, match, tmp_path, capfd) -> None:
    for key in extra[::2]:
        if key in arguments:
            del arguments[arguments.index(key) : arguments.index(key) + 2]
    line = refused(capfd, [*arguments, *extra])
    assert match in line
    assert not any((tmp_path / "out" / name).exists() for name in DERIVED)


@pytest.mark.parametrize("page", [False, True])
def test_a_model_that_cannot_learn_says_so_at_once(
    page, arguments, tiny_sdxl, tmp_path, capfd, monkeypatch
) -> None:
    """Before the reward is learnt, and before anybody looks at pictures."""
    monkeypatch.setattr("expunge.densities.head_training.learn", None)
    monkeypatch.setattr("expunge.feedback.command.collect", None)
    for key, value in (("--model", tiny_sdxl), ("--labels", arguments[2])):
        del arguments[arguments.index(key) : arguments.index(key) + 2]
        arguments += [key, value] if not page or key == "--model" else []
    line = refused(capfd, [*arguments, *(["--page", "true", "--prompt", "a key"] if page else [])])
    assert "got a model with 2 text encoders; allowed: one" in line
    assert not (tmp_path / "out").exists()


def test_one_class_only_and_a_corrupt_picture(arguments, labelled, tmp_path, capfd) -> None:
    torn = labelled / "no" / "3.png"
    torn.write_bytes(torn.read_bytes()[:60])
    assert f"got picture {torn}, which cannot be read" in refused(capfd, arguments)
    for file in list((labelled / "no").iterdir())[1:]:
        file.unlink()
    assert "5 yes and 1 no" in refused(capfd, arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_results_is_not_touched(arguments, tmp_path, capfd) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".expunge").touch()
    (tmp_path / "out" / "train_result.json").write_text("{}")
    assert "holds other results" in refused(capfd, [*arguments, "--overwrite", "true"])


def test_a_head_for_another_clip_is_refused(arguments, tmp_path) -> None:
    from expunge.errors import UserError

    assert main(arguments) == 0
    with pytest.raises(UserError, match="for CLIP emoji of width"):
        ClipHead(str(tmp_path / "out" / "reward.safetensors"), clip="emoji").build()


def start(*arguments: str) -> tuple[Forked, str]:
    """The command and the address of its page."""
    process = Forked(["expunge", "feedback", *arguments])
    while not (said := re.search(r"^open (http://127\.0\.0\.1:\S+)", process.output(), re.M)):
        assert process.poll() is None, process.errors()
        time.sleep(0.02)
    return process, said[1]


def say(address: str, picture: int, label: str) -> None:
    body = json.dumps({"picture": picture, "label": label}).encode()
    urllib.request.urlopen(urllib.request.Request(address + "label", body), timeout=10).close()


def test_the_page_from_drawing_to_a_token(tiny_sd1, tiny_clip, tmp_path) -> None:
    """Interrupted after three presses and resumed; prompts without a yes are preserved."""
    out = tmp_path / "out"
    arguments = ["--page", "true", "--model", tiny_sd1, "--clip", tiny_clip, *QUICK]
    arguments += ["--prompt", "a bomb", "--prompt", "a key", "--images_per_prompt", "2"]
    arguments += ["--output_dir", str(out)]
    process, address = start(*arguments)
    for picture, label in enumerate(("yes", "yes", "no")):
        say(address, picture, label)
    process.interrupt()
    assert process.wait(60) == 130
    drawn = {file: file.stat().st_mtime_ns for file in (out / "pictures").iterdir()}
    assert len(drawn) == 4
    process, address = start(*arguments)
    with urllib.request.urlopen(address + "state", timeout=10) as answer:
        assert json.load(answer)["labels"] == ["yes", "yes", "no", ""]
    say(address, 3, "no")
    with contextlib.closing(urllib.request.urlopen(address + "done", b"{}", timeout=10)):
        pass
    assert process.wait(300) == 0, process.errors()
    assert {file: file.stat().st_mtime_ns for file in (out / "pictures").iterdir()} == drawn
    recipe = load(TrainConfig, with_output(out / "train.yaml"))
    assert recipe.concept.preserve == ["", "a key"]
    assert load_file(out / "tokens.safetensors").keys() == {"<concept>"}


def with_output(file: Path) -> Path:
    file.write_text(file.read_text() + "output_dir: x\n")
    return file


def test_the_settings_say_what_is_missing() -> None:
    with pytest.raises(ValueError, match="neither or both"):
        FeedbackConfig(output_dir="x")
    with pytest.raises(ValueError, match="neither or both"):
        FeedbackConfig(output_dir="x", prompt=["a bomb"])
    with pytest.raises(ValueError, match="neither or both"):
        FeedbackConfig(output_dir="x", page=True)
    assert FeedbackConfig(output_dir="x", page=True, prompt=["a"], name="it").token == "<it>"
