"""A run that was interrupted: it goes on to the bit, or says why it cannot."""

import dataclasses
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from expunge import adapters
from expunge.configuration import dump
from expunge.errors import UserError
from expunge.train.train_erase import train
from forked import Forked
from small_runs import KINDS, small_run

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys
from expunge.cli import run
from expunge.train.train_erase import main
sys.exit(run(main, sys.argv[1:]))
"""


# Killed twice and resumed twice, as users do it; the others once, which is much cheaper.
OFTEN = ("esd", "sdd", "esd-together", "ablation-noise")


def launch(arguments: list[str], script: str = SCRIPT) -> Forked:
    return Forked([sys.executable, "-c", script, *arguments], ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OFTEN)
def test_killed_at_any_step_and_resumed_is_bit_identical(tiny_sd1, tmp_path, kind) -> None:
    steps = 8
    reference = small_run(
        tiny_sd1, tmp_path / "whole", steps=steps, checkpoint_every=1, lr_scheduler="cosine",
        keep_checkpoints=steps, gradient_accumulation=2, **KINDS[kind],
    )  # fmt: skip
    yaml = tmp_path / "run.yaml"
    yaml.write_text(dump(reference))
    done = launch(["--config", str(yaml)])
    assert done.wait() == 0, done.errors()
    out = tmp_path / "killed"
    arguments = ["--config", str(yaml), "--output_dir", str(out)]
    moments = random.Random(kind).sample(range(1, steps), 2)
    for step in sorted(moments):
        process = launch([*arguments, "--resume", "true"])
        # Killed right as, or shortly after, that step's state appears.
        while not (out / "checkpoints" / f"step-{step:06d}").exists():
            assert process.poll() is None, process.errors()
            time.sleep(0.002)
        time.sleep(random.Random(step).random() * 0.05)
        process.kill()
    done = launch([*arguments, "--resume", "true"])
    assert done.wait() == 0, done.errors()
    same_end(tmp_path / "whole", out)
    again = launch([*arguments, "--resume", "true"])
    assert again.wait() == 0
    assert "nothing to resume" in again.output()


# The third step is taken, and lost: it was to be kept with the fourth.
KILLED = """
import os, signal
from expunge.train.loop import Trainer
optimise = Trainer._optimise
def once(self, step):
    logs = optimise(self, step)
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return logs
Trainer._optimise = once
"""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OFTEN])
def test_killed_once_every_other_kind_goes_on_to_the_bit(tiny_sd1, tmp_path, kind) -> None:
    run = small_run(tiny_sd1, tmp_path / "killed", checkpoint_every=2, **KINDS[kind])
    (tmp_path / "run.yaml").write_text(dump(run))
    # In as many threads as this process has been left with, which decide the last bits.
    alike = f"import torch\ntorch.set_num_threads({torch.get_num_threads()})\n"
    child = launch(["--config", str(tmp_path / "run.yaml")], alike + KILLED + SCRIPT)
    whole = dataclasses.replace(run, output_dir=str(tmp_path / "whole"))
    train(whole)
    assert child.wait() == -signal.SIGKILL, child.errors()
    assert [f.name for f in (tmp_path / "killed" / "checkpoints").iterdir()] == ["step-000002"]
    train(dataclasses.replace(run, resume=True))
    same_end(tmp_path / "whole", tmp_path / "killed")


def same_end(whole: Path, killed: Path) -> None:
    """The same LoRA to the bit, and what it cost is counted as if nothing had happened."""
    assert (whole / adapters.FILE).read_bytes() == (killed / adapters.FILE).read_bytes()
    results = [json.loads((folder / "train_result.json").read_text()) for folder in (whole, killed)]
    for name in ("unet_forwards", "sights"):
        assert results[0][name] == results[1][name]


def test_resuming_another_run_is_refused(tiny_sd1, tmp_path) -> None:
    train(small_run(tiny_sd1, tmp_path / "out", steps=2, checkpoint_every=1))
    (tmp_path / "out" / "train_result.json").unlink()
    with pytest.raises(UserError, match="another learning_rate"):
        train(small_run(tiny_sd1, tmp_path / "out", steps=2, learning_rate=1.0, resume=True))


def test_resuming_on_other_weights_is_refused(tiny_sd1, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_sd1, base)
    run = small_run(str(base), tmp_path / "out", steps=2, checkpoint_every=1)
    train(run)
    (tmp_path / "out" / "train_result.json").unlink()
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v * 1.01 for k, v in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="not those the run began with"):
        train(dataclasses.replace(run, resume=True))


def test_resuming_on_another_commit_of_the_hub_is_refused(tiny_sd1, tmp_path, monkeypatch) -> None:
    """Laid out as huggingface_hub does it; files that are loaded by nobody may come and go."""
    cache = tmp_path / "cache" / "models--someone--tiny"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (cache / "refs").mkdir(parents=True)
    for commit in ("0" * 40, "1" * 40):
        shutil.copytree(tiny_sd1, cache / "snapshots" / commit)
    (cache / "refs" / "main").write_text("0" * 40)
    run = small_run("someone/tiny", tmp_path / "out", steps=2, checkpoint_every=1)
    before = train(run).read_bytes()
    record = json.loads((tmp_path / "out" / "train_result.json").read_text())
    assert (record["base_commit"], record["base_sha256"]) == ("0" * 40, None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: someone/tiny\n")
    assert f"commit `{record['base_commit']}`" in card

    def resume() -> Path:
        (tmp_path / "out" / "train_result.json").unlink(missing_ok=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        return train(dataclasses.replace(run, resume=True))

    (cache / "snapshots" / ("0" * 40) / "unet" / "another.fp16.safetensors").touch()
    assert resume().read_bytes() == before
    (cache / "refs" / "main").write_text("1" * 40)
    with pytest.raises(UserError, match="not those the run began with"):
        resume()


@pytest.mark.parametrize("text", ["a: [", "just words", ""])
def test_a_folder_whose_configuration_is_broken_is_not_resumed(tiny_sd1, tmp_path, text) -> None:
    run = small_run(tiny_sd1, tmp_path / "out", steps=1)
    train(run)
    (tmp_path / "out" / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="which no training wrote"):
        train(dataclasses.replace(run, resume=True))


def test_a_torn_checkpoint_is_named(tiny_sd1, tmp_path) -> None:
    run = small_run(tiny_sd1, tmp_path / "out", steps=2, checkpoint_every=1)
    train(run)
    (tmp_path / "out" / "train_result.json").unlink()
    torn = tmp_path / "out" / "checkpoints" / "step-000002" / "adapter.safetensors"
    torn.write_bytes(torn.read_bytes()[:50])
    with pytest.raises(UserError, match=r"step-000002.*cannot be read"):
        train(dataclasses.replace(run, resume=True))


def test_a_kill_between_the_lora_and_its_result_is_finished_by_a_resume(tiny_sd1, tmp_path) -> None:
    run = small_run(tiny_sd1, tmp_path / "out", steps=2, checkpoint_every=1)
    train(run)
    before = (tmp_path / "out" / adapters.FILE).read_bytes()
    for name in ("train_result.json", "README.md"):
        (tmp_path / "out" / name).unlink()
    train(dataclasses.replace(run, resume=True))
    assert (tmp_path / "out" / "train_result.json").is_file()
    assert (tmp_path / "out" / "README.md").is_file()
    assert (tmp_path / "out" / adapters.FILE).read_bytes() == before
