"""The model that is shipped: complete, small, loadable without expunge, and it draws as told."""

import json
import subprocess
import sys

import pytest

from expunge.backbones import bundled, load_pipeline
from expunge.eval.detectors.emoji_judge import load_judge
from expunge.generation import generate

EMOJI = bundled("emoji")


def test_only_safetensors_and_under_60_megabytes() -> None:
    files = [file for file in EMOJI.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 60e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".md", ".txt"}


def test_plain_diffusers_draws_with_it(tmp_path) -> None:
    script = f"""
import sys
sys.modules["expunge"] = None
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained({str(EMOJI)!r})
pipeline("a cat face", guidance_scale=4, num_inference_steps=2).images[0].save("cat.png")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert (tmp_path / "cat.png").stat().st_size > 100


def test_it_draws_what_it_is_told() -> None:
    """A coarse check, for a wrong file or scale; the figures are in quality.json."""
    names = ["bomb", "panda", "key", "pizza", "rocket", "skull", "umbrella", "star"]
    pipeline = load_pipeline("emoji")
    images = generate(
        pipeline, [f"a {name}" for name in names], range(8), steps=12, guidance_scale=4.0
    )
    judge, labels = load_judge(EMOJI / "judge")
    seen = judge.judge(images).objects.argmax(1)
    assert sum(labels["objects"][i] == n for i, n in zip(seen, names, strict=True)) >= 6


def test_every_word_of_its_captions_is_one_token() -> None:
    vocabulary = json.loads((EMOJI / "vocabulary.json").read_text())
    tokenizer = load_pipeline("emoji").tokenizer
    phrases = [entry["phrase"] for entry in vocabulary["objects"].values()]
    phrases += [entry["phrase"] for entry in vocabulary["categories"].values()]
    for phrase in phrases:
        for style in vocabulary["styles"]:
            for background in vocabulary["backgrounds"]:
                text = f"{phrase} in {style} style on a {background} background"
                assert len(tokenizer(text).input_ids) == len(text.split()) + 2, text


def test_the_recorded_quality_is_of_this_judge_and_enough_pictures() -> None:
    quality = json.loads((EMOJI / "quality.json").read_text())
    assert quality["pictures"] >= 640
    for name in ("single_top1", "style", "background", "pair_recall"):
        found = quality[name]
        assert found["low"] <= found["value"] <= found["high"]
        assert found["n"] >= 320
    held_out = json.loads((EMOJI / "judge" / "judge.json").read_text())["held_out"]
    assert quality["judge_held_out"] == held_out
    assert held_out["single"] >= 0.995
    assert held_out["style"] >= 0.98
    assert held_out["pair_recall"] >= 0.95


def test_a_judge_that_is_broken_is_refused(tmp_path) -> None:
    from expunge.errors import UserError

    with pytest.raises(UserError, match="does not exist"):
        load_judge(tmp_path)
    (tmp_path / "judge.json").write_text((EMOJI / "judge" / "judge.json").read_text())
    (tmp_path / "judge.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="not a readable judge"):
        load_judge(tmp_path)
