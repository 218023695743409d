"""Two processes on CPUs, as launched by users: the same run as one, and what a lost one does."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from expunge import adapters
from expunge.cli import run as run_command
from expunge.concepts import Concept
from expunge.configuration import dump
from expunge.errors import UserError
from expunge.train import launch as launch_module
from expunge.train.config import Lora, TrainConfig, Validation
from expunge.train.latents import Replay
from expunge.train.objectives.sdd import Sdd
from expunge.train.preserve import Preserve
from expunge.train.train_erase import train

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]


def config(model: str, folder: Path, processes: int, **changes) -> TrainConfig:
    """One run, on any number of processes: everything that a checkpoint keeps takes part."""
    run = TrainConfig(
        output_dir=str(folder),
        model=model,
        concept=Concept(targets=["a bomb"], preserve=["", "a key", "a cat face"]),
        objective=Sdd(ema_decay=0.9),
        latents=Replay(steps=3, source="ema", rollouts=9, refresh=3),
        preserve=Preserve(weight=1.0, batch_size=2 // processes, pairs=0.5),
        lora=Lora(rank=2, alpha=4.0),
        steps=8,
        batch_size=4 // processes,
        gradient_accumulation=2,
        learning_rate=1e-2,
        checkpoint_every=2,
        validation=Validation(prompts=["a bomb"], seeds=1, steps=1),
    )
    return dataclasses.replace(run, **changes)


def launch(command: list[str], run: TrainConfig, *more: str) -> subprocess.Popen:
    yaml = Path(f"{run.output_dir}.yaml")
    yaml.write_text(dump(run))
    return subprocess.Popen(
        [*command, "train_erase.py", "--config", str(yaml), *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill_the_second(process: subprocess.Popen, folder: Path) -> None:
    """With SIGKILL, once there is a checkpoint."""
    while not list(folder.glob("checkpoints/step-*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    (second,) = (child for child in children if child.environ().get("RANK") == "1")
    second.kill()


def same_run(one: Path, other: Path) -> None:
    """Weights within rounding, and the same passes but of the teacher.

    Each process remembers what it has asked it, so that two may ask the same.
    """
    a, b = (load_file(folder / adapters.FILE) for folder in (one, other))
    assert a.keys() == b.keys()
    for name, weight in a.items():
        torch.testing.assert_close(weight, b[name], atol=1e-4, rtol=1e-3)
    a, b = (
        json.loads((folder / "train_result.json").read_text())["unet_forwards"]
        for folder in (one, other)
    )
    for name in ("student", "sampling"):
        assert a[name] == b[name]
    assert a["teacher"] <= b["teacher"] <= 2 * a["teacher"]


@pytest.fixture(scope="module")
def alone(tiny_sd1, tmp_path_factory) -> Path:
    """The run on one process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return train(config(tiny_sd1, tmp_path_factory.mktemp("alone") / "out", 1)).parent


def test_two_processes_are_one_with_the_same_batch(alone, tiny_sd1, tmp_path) -> None:
    run = config(tiny_sd1, tmp_path / "two", 2)
    process = launch([*ACCELERATE, "--num_processes", "2", "--cpu"], run)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert out.count("the LoRA was read back") == 1
    same_run(alone, tmp_path / "two")
    states = tmp_path / "two" / "checkpoints" / "step-000008"
    assert (states / "random_states_1.pkl").is_file()  # there were two


def test_a_killed_one_ends_the_run_in_one_line_and_one_alone_goes_on(
    alone, tiny_sd1, tmp_path
) -> None:
    run = config(tiny_sd1, tmp_path / "two", 2)
    file = "configs/accelerate/two_cpu.yaml"
    process = launch([*ACCELERATE, "--quiet", "--config_file", file], run)
    kill_the_second(process, tmp_path / "two")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in errors
    ours = [line for line in errors.splitlines() if line.startswith("expunge: ")]
    assert ours == [
        "expunge: error: process 2 of 2 was ended by SIGKILL, and the others with it; the same "
        "command with --resume true goes on from the newest checkpoint"
    ]
    assert not (tmp_path / "two" / adapters.FILE).exists()
    kept = (tmp_path / "two" / "config.yaml").read_text()
    # One process with half the batch would be another run; with all of it it is this one.
    with pytest.raises(UserError, match=r"got 2 erased and 1 retained .* 4 and 2"):
        train(dataclasses.replace(run, resume=True))
    assert (tmp_path / "two" / "config.yaml").read_text() == kept
    train(config(tiny_sd1, tmp_path / "two", 1, resume=True))
    same_run(alone, tmp_path / "two")


def test_what_one_alone_began_two_go_on_with(alone, tiny_sd1, tmp_path) -> None:
    """From a checkpoint in the middle of a bank."""
    folder = tmp_path / "two"
    shutil.copytree(alone, folder)
    for gone in ("train_result.json", adapters.FILE):
        (folder / gone).unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000008")
    run = config(tiny_sd1, folder, 2, resume=True)
    process = launch([*ACCELERATE, "--num_processes", "2", "--cpu"], run)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    same_run(alone, folder)
    assert (folder / "checkpoints" / "step-000008" / "random_states_1.pkl").is_file()


@pytest.mark.slow
def test_under_torchrun_those_that_are_left_say_it(tiny_sd1, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    process = launch(TORCHRUN, config(tiny_sd1, tmp_path / "two", 2, steps=1000))
    kill_the_second(process, tmp_path / "two")
    _, errors = process.communicate()
    assert process.returncode == 1
    said = [line for line in errors.splitlines() if line.startswith("expunge: error: ")]
    assert len(said) == 1
    assert "another process of this run has ended" in said[0]
    assert "--resume true" in said[0]


def test_several_that_cannot_be_counted_are_refused(monkeypatch) -> None:
    """As below a shell script: going on alone would silently train on a part of the batch."""
    for name in launch_module.GROUPED:
        monkeypatch.delenv(name, raising=False)
    assert launch_module.wanted() == 1
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.raises(UserError, match="directly"):
        launch_module.wanted()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch_module.wanted() == 1


WRONG = """
import os, sys, time
from expunge.cli import run
from expunge.errors import UserError

def command(argv):
    if os.environ["RANK"] in argv:
        raise UserError(f"got process {os.environ['RANK']}")
    time.sleep(60)

sys.exit(run(command, sys.argv[1:]))
"""


@pytest.mark.parametrize("ranks", ["0", "1", "01", "12"])
def test_what_is_wrong_for_any_process_is_one_line(capfd, ranks: str) -> None:
    assert launch_module.start(3, [sys.executable, "-c", WRONG, *ranks]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(f"expunge: error: got process [{ranks}]", line)


WATCHER = """
import sys
from expunge.train.launch import start
start(2, [sys.executable, "-m", "expunge.cli", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    ("verb", "learning"),
    [("train", False), ("eval", False), pytest.param("train", True, marks=pytest.mark.slow)],
)
def test_nobody_outlives_a_killed_watcher(tiny_sd1, tmp_path, verb: str, learning: bool) -> None:
    """Neither before the libraries are there, nor when each waits for what the other computes."""
    out = tmp_path / "out"
    words = ["--concept", "a bomb", "--output_dir", str(out)]
    if verb == "train":
        yaml = tmp_path / "run.yaml"
        yaml.write_text(dump(config(tiny_sd1, out, 2, steps=10**6)))
        words = ["--config", str(yaml)]
    watcher = psutil.Popen([sys.executable, "-c", WATCHER, verb, *words])
    while len(ranks := watcher.children()) < 2 or (
        learning and not list(out.glob("checkpoints/step-*"))
    ):
        time.sleep(0.02)
    watcher.kill()
    watcher.wait()
    try:
        assert psutil.wait_procs(ranks, 30)[1] == []
    finally:
        for rank in ranks:
            if rank.is_running():
                rank.kill()
    assert learning or not out.exists()


def test_what_is_wrong_is_said_though_it_cannot_be_passed_on(monkeypatch, capfd, tmp_path) -> None:
    def command(argv):
        raise UserError("got a full disk")

    monkeypatch.setenv(launch_module.OURS, str(tmp_path / "none" / "said"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_command(command, []) == 2
    assert capfd.readouterr().err == "expunge: error: got a full disk\n"


def test_wrong_input_is_one_line_for_all_processes(tmp_path) -> None:
    """Though each of them finds it, when it loads the model."""
    run = config("nobody/nothing-at-all", tmp_path / "two", 2)
    process = launch([*ACCELERATE, "--quiet", "--num_processes", "2", "--cpu"], run)
    _, errors = process.communicate()
    assert process.returncode == 1  # accelerate's own, for any failure
    assert errors.count("expunge: error: ") == 1
    assert "cannot be loaded" in errors
    assert "Traceback" not in errors
