"""Several processes, and processes that are killed: the same report, no picture made twice."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import forked
from expunge.eval.team import on_cpu
from expunge.pictures import save_png, to_pil
from expunge.train.launch import OURS

LIMIT = 3


@pytest.fixture
def command(suite_file: Path, tiny_model: Path, tiny_lora: Path, tmp_path: Path) -> list[str]:
    """With a metric that keeps features of a folder beside the pictures."""
    (tmp_path / "reference").mkdir()
    for i in range(3):
        save_png(to_pil(torch.full((3, 64, 64), i - 1.0)), tmp_path / "reference" / f"{i}.png")
    table = yaml.safe_load(suite_file.read_text())
    table["metrics"]["kid"] = {
        "type": "kid", "extractor": "emoji_judge", "reference": str(tmp_path / "reference"),
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(table))
    return [
        sys.executable, "-m", "expunge.cli", "eval", "--suite", str(tmp_path / "suite.yaml"),
        "--model", str(tiny_model), "--lora", str(tiny_lora), "--limit", str(LIMIT),
    ]  # fmt: skip


def stable(folder: Path) -> bytes:
    """report.json but for who made it and when, as it stands in the file."""
    report = json.loads((folder / "report.json").read_text())
    del report["provenance"]
    return json.dumps(report).encode() + (folder / "scores.json").read_bytes()


def pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """Every picture's file and when it was written; a picture made twice is another file."""
    return {
        file.name: (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in folder.glob("images/??/*.png")
    }


def run(command: list[str], folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    whole = [*command, "--output_dir", str(folder), *words]
    if "--processes" not in words:
        return forked.run(whole)
    return subprocess.run(whole, capture_output=True, text=True, check=False)


MEETS = """
import torch
from torch.distributed import distributed_c10d as groups
from expunge.eval.team import Team
team = Team.join()
options = groups._get_default_group()._get_backend(torch.device("cpu")).options
print(team.rank, team.size, groups.get_backend(), options._timeout.days)
team.wait()
"""


def two(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[forked.Forked]:
    """A command as two processes of one group, started by nobody who watches them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    for name, value in (group | {"LOCAL_WORLD_SIZE": "2", OURS: "1"}).items():
        monkeypatch.setenv(name, value)
    processes = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        processes.append(forked.Forked(words))
    return processes


def test_processes_meet_on_the_cpu_and_wait_for_each_other_for_days(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processes = two([sys.executable, "-c", MEETS], monkeypatch)
    assert [process.wait(60) for process in processes] == [0, 0], processes[0].errors()
    assert [process.output() for process in processes] == ["0 2 gloo 7\n", "1 2 gloo 7\n"]


def test_nccl_is_for_those_who_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(OURS, raising=False)
    assert [on_cpu(device) for device in ("auto", "cuda", "cpu")] == [False, False, True]
    monkeypatch.setenv(OURS, "1")
    assert [on_cpu(device) for device in ("auto", "cuda", "cpu")] == [True, True, True]


def test_what_each_process_makes_and_finds_damaged_is_told(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "r"

    def cost() -> dict[str, Any]:
        processes = two([*command, "--output_dir", str(folder)], monkeypatch)
        assert [process.wait(120) for process in processes] == [0, 0], processes[0].errors()
        said = processes[0].output()
        found: dict[str, Any] = json.loads((folder / "cost.json").read_text())
        assert [line for line in said.splitlines() if "damaged" in line] == [
            f"note: {note}" for note in found["notes"]
        ]
        return found

    first = cost()
    assert first["pictures"] == first["generated"]
    assert sum(first["generated"].values()) == len(pictures(folder))
    assert first["notes"] == []
    damaged = list(folder.glob("images/??/*.png"))
    for file in damaged:
        file.write_bytes(b"broken")
    second = cost()
    assert second["generated"] == second["pictures"] == first["pictures"]
    assert sorted(note.split()[0] for note in second["notes"]) == sorted(
        str(file.relative_to(folder / "images")) for file in damaged
    )
    third = cost()
    assert third["pictures"] == first["pictures"]
    assert set(third["generated"].values()) == {0}
    assert third["notes"] == []


@pytest.mark.slow
def test_two_processes_share_the_work_and_say_the_same(command: list[str], tmp_path: Path) -> None:
    alone = run(command, tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    both = run(command, tmp_path / "two", "--processes", "2")
    assert both.returncode == 0, both.stderr
    assert stable(tmp_path / "one") == stable(tmp_path / "two")
    cost = json.loads((tmp_path / "two" / "cost.json").read_text())
    made = len(pictures(tmp_path / "two"))
    assert cost["processes"] == 2
    assert sum(cost["generated"].values()) == made
    assert len(list((tmp_path / "two" / "images" / "scores").glob("*/*.jsonl"))) == 2
    assert len(list((tmp_path / "two" / "images" / "features").glob("*"))) == 1
    assert both.stdout.count("target_seen") == alone.stdout.count("target_seen") > 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_it_goes_on_to_the_same_report(
    command: list[str], tmp_path: Path, processes: int
) -> None:
    """`scripts/bench/kill_eval.py` does it twenty times on the bundled model."""
    assert run(command, tmp_path / "whole").returncode == 0
    draw, known = random.Random(processes), {}
    folder, kills = tmp_path / "killed", 0
    for _ in range(2):
        process = subprocess.Popen(
            [*command, "--output_dir", str(folder), "--processes", str(processes)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        after = len(known) + draw.randrange(1, 5)
        while process.poll() is None and len(pictures(folder)) < after:
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        now = pictures(folder)
        assert {name: now.get(name) for name in known} == known
        known = now
    assert kills
    last = run(command, folder, "--processes", str(processes))
    assert last.returncode == 0, last.stderr
    now: dict[str, Any] = pictures(folder)
    assert {name: now.get(name) for name in known} == known
    assert set(now) == set(pictures(tmp_path / "whole"))
    assert stable(folder) == stable(tmp_path / "whole")


@pytest.mark.slow
def test_a_process_that_is_lost_is_one_line(command: list[str], tmp_path: Path) -> None:
    import psutil

    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "r"), "--processes", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while len(pictures(tmp_path / "r")) < 2 and process.poll() is None:
        time.sleep(0.01)
    children = [c for c in psutil.Process(process.pid).children() if c.is_running()]
    os.kill(children[-1].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    said = [line for line in errors.splitlines() if line.startswith("expunge:")]
    assert len(said) == 1, errors
    assert "SIGKILL" in said[0]
    assert "goes on where it was" in said[0]
    assert "Traceback" not in errors


KILLED = """
import os, signal, sys
from expunge.cli import main
from expunge.eval.score_store import ScoreStore

put, left = ScoreStore.put, [int(sys.argv.pop(1))]

def counted(*words):
    put(*words)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

ScoreStore.put = counted
sys.exit(main(sys.argv[1:]))
"""


def judged(folder: Path) -> list[str]:
    files = (folder / "images" / "scores").glob("*/*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_bytes().split(b"\n") if line]
    return [row["picture"] for row in rows]


def test_killed_while_it_judges_it_judges_no_picture_twice(
    command: list[str], tmp_path: Path
) -> None:
    assert run(command, tmp_path / "whole").returncode == 0
    folder = tmp_path / "killed"
    # The fourth picture of the base, and the seventh of the other model.
    n = len(judged(tmp_path / "whole")) // 2
    for after, known in ((4, 4), (n - 4 + 7, n + 7)):
        words = [after, *command[command.index("eval") :], "--output_dir", folder]
        assert forked.Forked([sys.executable, "-c", KILLED, *words]).wait() == -signal.SIGKILL
        assert len(judged(folder)) == known
    made = pictures(folder)
    assert run(command, folder).returncode == 0
    assert pictures(folder) == made
    assert len(set(judged(folder))) == len(judged(folder)) == 2 * n
    assert stable(folder) == stable(tmp_path / "whole")
