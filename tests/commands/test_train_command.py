"""The commands as people type them: launched, overridden, misused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import forked
from expunge.cli import main

ROOT = Path(__file__).resolve().parents[2]
QUICK = [
    "--concept.targets",
    '["a bomb"]',
    "--latents.steps",
    "2",
    "--steps",
    "1",
    "--validation.steps",
    "1",
    "--validation.seeds",
    "1",
]


def call(*arguments: str, launcher: tuple[str, ...] = ("-m", "expunge.cli")):
    return forked.run([sys.executable, *launcher, *arguments], ROOT)


def refused(capfd, *arguments: str) -> str:
    """The one line with which a command refuses its input, in this process for speed."""
    assert main(list(arguments)) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("expunge: error: ")
    return lines[0]


def launch(*arguments: str):
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "train_erase.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def lora(tiny_sd1, tmp_path_factory) -> Path:
    """A LoRA made by `accelerate launch train_erase.py`, every key from the command line."""
    out = tmp_path_factory.mktemp("launched") / "out"
    done = launch(
        "--config", "configs/train/emoji_bomb_esd.yaml", "--model", tiny_sd1, *QUICK[2:],
        "--concept.targets", '["a cigarette"]', "--lora.alpha", "16", "--output_dir", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_accelerate_launch_leaves_a_lora_of_the_named_target(lora) -> None:
    assert load_file(lora / "pytorch_lora_weights.safetensors")
    result = json.loads((lora / "train_result.json").read_text())
    assert result["concept"]["targets"] == ["a cigarette"]


def test_sample_with_and_without_lora(lora, tiny_sd1, tmp_path) -> None:
    common = ["sample", "--model", tiny_sd1, "--prompt", "a bomb", "--prompt", "a key"]
    common += ["--steps", "2", "--images_per_prompt", "2", "--seed", "5"]
    images = {}
    for name, more in {"base": [], "erased": ["--lora", str(lora)]}.items():
        done = call(*common, *more, "--output_dir", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / name / "samples.json").read_text())
        assert [(i["prompt"], i["seed"]) for i in found["images"]] == [
            ("a bomb", 5),
            ("a bomb", 6),
            ("a key", 5),
            ("a key", 6),
        ]
        assert all((tmp_path / name / i["file"]).is_file() for i in found["images"])
        assert (tmp_path / name / "grid.png").is_file()
        images[name] = {
            i["prompt"]: (tmp_path / name / i["file"]).read_bytes() for i in found["images"]
        }
    # The LoRA was trained for one step, and yet every picture shows that it is active.
    assert all(images["base"][prompt] != images["erased"][prompt] for prompt in images["base"])


def test_sample_is_what_plain_diffusers_draws(tiny_sd1, tmp_path) -> None:
    from diffusers import StableDiffusionPipeline
    from PIL import Image, ImageChops

    done = call(
        "sample", "--model", tiny_sd1, "--prompt", "a bomb", "--steps", "3", "--seed", "7",
        "--images_per_prompt", "1", "--output_dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1)
    expected = pipeline(
        "a bomb",
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    found = Image.open(tmp_path / "out" / "0000-seed-7.png")
    assert max(high for _, high in ImageChops.difference(found, expected).getextrema()) <= 1


BAD_TRAINING = {
    "misspelt key": (["--objective.negative_guidence", "1"], "negative_guidance"),
    "unknown objective": (["--objective.type", "esdd"], "did you mean"),
    "missing model folder": (["--model", "./nowhere"], "no folder"),
    "negative steps": (["--steps", "-3"], "steps"),
    "empty concept": (["--concept.targets", "[]"], "targets"),
    "blank target": (["--concept.targets", '[""]'], "targets"),
    "wrong type": (["--lora.rank", "many"], "rank"),
    "zero rank": (["--lora.rank", "0"], "rank"),
    "missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "preserve without prompts": (["--preserve.weight", "1"], "preserve"),
    "pairs without a noun": (
        ["--preserve", "{weight: 1, pairs: 0.5}", "--concept.preserve", '[""]'],
        "preserve.pairs",
    ),
}


@pytest.mark.parametrize("name", BAD_TRAINING)
def test_bad_training_input_is_one_line_and_leaves_nothing(name, tmp_path, capfd) -> None:
    arguments, word = BAD_TRAINING[name]
    out = tmp_path / "out"
    given = [*arguments, "--output_dir", str(out)]
    for key, value in zip(QUICK[::2], QUICK[1::2], strict=True):
        given += [] if key in arguments else [key, value]
    assert word in refused(capfd, "train", *given)
    assert not out.exists()


def test_bad_loras_are_one_line_and_leave_nothing(lora, tiny_sd1, tmp_path, capfd) -> None:
    file = lora / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    corrupt, foreign, pickle = (
        tmp_path / name for name in ("corrupt.safetensors", "foreign.safetensors", "lora.bin")
    )
    corrupt.write_bytes(file.read_bytes()[:400])
    save_file({k.replace("attn2", "attn9"): v for k, v in tensors.items()}, foreign)
    torch.save(tensors, pickle)
    for bad, word in (
        (corrupt, "safetensors"),
        (foreign, "does not fit"),
        (pickle, "pickle"),
        (tmp_path / "absent", "does not exist"),
    ):
        out = tmp_path / "out"
        given = ["--model", tiny_sd1, "--lora", str(bad), "--output_dir", str(out)]
        assert word in refused(capfd, "sample", "--prompt", "a bomb", *given)
        assert not out.exists()


def test_a_folder_with_results_is_left_alone(lora, tiny_sd1, capfd) -> None:
    before = {p: p.read_bytes() for p in lora.iterdir() if p.is_file()}
    given = ["--model", tiny_sd1, "--output_dir", str(lora)]
    assert "already holds results" in refused(capfd, "train", *QUICK, *given)
    assert "already holds results" in refused(capfd, "sample", "--prompt", "x", *given)
    assert before == {p: p.read_bytes() for p in lora.iterdir() if p.is_file()}


def test_the_shim_and_the_command_end_alike(tmp_path) -> None:
    wrong = ["--steps", "-1", *QUICK[:2], "--output_dir", str(tmp_path / "x")]
    for launcher in (("train_erase.py",), ("-m", "expunge.cli", "train")):
        done = call(*wrong, launcher=launcher)
        assert done.returncode == 2
        assert done.stderr.startswith("expunge: error: got steps -1")
        assert len(done.stderr.strip().splitlines()) == 1
