"""The README and the docs are run, not trusted: every command line and every Python block."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import forked
from expunge.configuration import load
from expunge.eval.suite import load_suite
from expunge.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What makes a documented command quick enough for a test; it runs otherwise as it stands.
QUICK = {
    "expunge train": "--steps 1 --latents.steps 2 --validation.steps 1 --validation.seeds 1",
    "accelerate launch": "--steps 1 --latents.steps 2 --validation.steps 1 --validation.seeds 1",
    "expunge sample": "--steps 2 --images_per_prompt 1",
    "expunge eval": "--limit 1",
    "expunge compare": "",
    "expunge attack": "--limit 1 --attack.queries 1",
    "expunge export": "--steps 1",
    "expunge feedback": "--inversion.steps 2 --inversion.batch_size 2 --sampling_steps 1",
    "expunge ls": "",
    "expunge --help": "",
}
MAKE = ("make install", "make demo", "make test", "make check")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def command_lines(page: Path) -> list[str]:
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and line[0] != "#"]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    if command[0] != "accelerate":
        return forked.run(command, folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
def test_the_readme_runs_from_top_to_bottom(tmp_path) -> None:
    """In a folder that sees the clone's configs and shim, as after `cd expunge`."""
    for name in ("configs", "train_erase.py", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    lines = command_lines(ROOT / "README.md")
    assert any(line.startswith("accelerate launch") for line in lines)
    for line in lines:
        if line in MAKE or line.startswith(("git clone", "cd ", "pip install")):
            continue
        key = next((k for k in QUICK if line.startswith(k)), None)
        assert key is not None, f"the README shows a command that no test runs: {line}"
        # Pictures of the base that several evaluations need are made once.
        store = "--store images" if key == "expunge eval" else ""
        done = run(shlex.split(f"{line} {QUICK[key]} {store}"), tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    for index, block in enumerate(blocks(ROOT / "README.md", "python")):
        done = run([sys.executable, "-c", block], tmp_path)
        assert done.returncode == 0, f"python block {index}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["samplers.md", "exporting.md", "evaluation.md", "suites.md", "reports.md", "attacks.md"],
)
def test_a_page_of_the_docs_runs(tmp_path, name) -> None:
    page = ROOT / "docs" / name
    for line in command_lines(page):
        key = next(k for k in QUICK if line.startswith(k))
        done = run(shlex.split(f"{line} {QUICK[key]}"), tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    for block in blocks(page, "python"):
        done = run([sys.executable, "-c", block], tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_page_on_training_runs(tmp_path) -> None:
    page = ROOT / "docs" / "training.md"
    for name in ("configs", "train_erase.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for line in command_lines(page):
        done = run(shlex.split(f"{line} {QUICK['accelerate launch']}"), tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_settings_of_the_page_on_training_go_together(tmp_path) -> None:
    shown, small = blocks(ROOT / "docs" / "training.md", "yaml")
    (tmp_path / "shown.yaml").write_text(f"{shown}output_dir: x\n")
    assert load(TrainConfig, tmp_path / "shown.yaml").concept.images
    (tmp_path / "small.yaml").write_text(f"{small}concept: {{targets: [a bomb]}}\noutput_dir: x\n")
    assert load(TrainConfig, tmp_path / "small.yaml").base_precision == "nf4"


@pytest.mark.slow
def test_the_page_on_feedback_runs(tmp_path) -> None:
    """But the command that waits for key presses, which tests/feedback runs."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    page = ROOT / "docs" / "feedback.md"
    for line in command_lines(page):
        if "--page true" in line:
            continue
        key = next(k for k in QUICK if line.startswith(k))
        quick = QUICK[key] + (" --latents.rollouts 1" if key == "expunge train" else "")
        line = re.sub(r"--images_per_prompt \d+", "", line)
        done = run(shlex.split(f"{line} {quick}"), tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    (block,) = blocks(page, "python")
    done = run([sys.executable, "-c", block], tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_suite_of_the_docs_plans_its_pictures(tmp_path) -> None:
    (block,) = blocks(ROOT / "docs" / "suites.md", "yaml")
    (tmp_path / "suite.yaml").write_text(block)
    suite = load_suite(str(tmp_path / "suite.yaml"))
    (tmp_path / "i2p_violence.csv").write_text("prompt,sd_seed\na bomb,4048860635\n")
    prompts = replace(suite.prompts, path=tmp_path / suite.prompts.path)
    (case,) = prompts.plan(["violence"]).cases
    assert (case.prompt, case.seed, case.group) == ("a bomb", 4048860635, "harmful")
    assert {q.metric for q in case.questions} == set(suite.metrics)
    assert {case.group} == set(suite.groups)


def test_make_targets_that_are_shown_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for target in re.findall(r"make (\w+)$", "\n".join(command_lines(page)), re.M):
            assert target in targets


def test_links_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_configurations_of_the_docs_are_read(tmp_path) -> None:
    from expunge.configuration import parse
    from expunge.train.config import TrainConfig

    found = blocks(ROOT / "docs" / "methods.md", "yaml")
    assert found
    for block in found:
        (tmp_path / "run.yaml").write_text(block)
        config = parse(TrainConfig, ["--config", str(tmp_path / "run.yaml"), "--output_dir", "x"])
        assert config.concept.targets


def test_the_objective_of_the_docs_trains(tmp_path, tiny_sd1) -> None:
    """Adding an objective takes one file and one line: exactly the two that the docs show."""
    code, line = blocks(ROOT / "docs" / "methods.md", "python")
    name, target = re.search(r'"(\w+)": Entry\("([\w.:]+)"', line).groups()
    module, cls = target.split(":")
    assert code.startswith(f"# {module.removeprefix('expunge.').replace('.', '/')}.py")
    (tmp_path / "own_objective.py").write_text(code)
    script = f"""
import sys
from expunge.cli import run
from expunge.registry import Entry
from expunge.train.objectives import OBJECTIVES
from expunge.train.train_erase import main
OBJECTIVES.add({name!r}, Entry("own_objective:{cls}", "from the docs"))
sys.exit(run(main, sys.argv[1:]))
"""
    arguments = ["--model", tiny_sd1, "--objective.type", name, "--concept.anchor", "a balloon"]
    arguments += ["--concept.targets", '["a bomb"]', "--output_dir", "out"]
    done = run(
        [sys.executable, "-c", script, *arguments, *QUICK["expunge train"].split()], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
