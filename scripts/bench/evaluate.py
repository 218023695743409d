"""The harness at scale: many prompts, several processes, one kill in the middle.

    python scripts/bench/evaluate.py --output_dir D [--prompts 10000] [--steps 25] [--processes 2]
        [--lora L]

Evaluates the bundled model on captions of its own vocabulary, with a LoRA beside its base as most
evaluations are, is killed when half of the pictures are there, and goes on. Prints one JSON line
last: pictures a second, what resuming cost as a share of the whole, memory of a process at a tenth
and at the end of the run, and of the rerun the seconds of judging and of each metric (which look at
all pictures there) and the pictures that it made.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from expunge.cli import run
from expunge.configuration import parse
from expunge.errors import UserError
from expunge.eval.suite import load_suite


@dataclass(frozen=True)
class Config:
    output_dir: Path
    prompts: int = 10_000
    steps: int = 25
    processes: int = 2
    lora: str | None = field(
        default=None, metadata={"help": "of the bundled model; then the base is evaluated too"}
    )
    metrics: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "more metrics, as a suite has them"}
    )

    @property
    def pictures(self) -> int:
        """Of all models."""
        return self.prompts * (2 if self.lora else 1)


@dataclass
class Phase:
    """One run of the command, watched once a second.

    Attributes:
        pictures: (seconds since the start, pictures that are there).
        memory: (pictures that are there, bytes of the largest process).
    """

    pictures: list[tuple[float, int]] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    seconds: float = 0.0


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "scripts/bench/evaluate.py")
    if config.output_dir.exists():
        raise UserError(f"got output folder {config.output_dir}, which exists; choose another")
    config.output_dir.mkdir(parents=True)
    write_suite(config)
    first = watch(config, stop_at=config.pictures // 2)
    second = watch(config)
    cost = json.loads((config.output_dir / "run" / "cost.json").read_text())
    had = first.pictures[-1][1]
    # Until the first new picture, the rerun paid for being a rerun; so did the last batches before.
    start = next(t for t, n in second.pictures if n > second.pictures[0][1])
    whole = first.seconds + second.seconds
    memory = sorted(first.memory + second.memory)
    print(json.dumps({
        "prompts": config.prompts, "pictures": config.pictures, "steps": config.steps,
        "processes": config.processes,
        "pictures_per_second": round((had - first.pictures[0][1]) / first.seconds, 3),
        "seconds": round(whole, 1),
        "resume_seconds": round(start, 1), "resume_share": round(start / whole, 4),
        "megabytes_at_a_tenth": at(memory, config.pictures // 10) >> 20,
        "megabytes_at_the_end": memory[-1][1] >> 20,
        "seconds_of_the_rerun": cost["seconds"], "made_by_the_rerun": cost["generated"],
    }))  # fmt: skip


def write_suite(config: Config) -> None:
    """Captions of the emoji suite's own groups, each with the question that goes with it."""
    emoji = load_suite("emoji")
    table = {
        "name": "scale", "version": 1, "description": "many captions", "steps": config.steps,
        "guidance_scale": emoji.guidance_scale,
        "prompts": {"type": "emoji", "cross_domain": {"pictures": config.prompts}},
        "detector": {"type": "emoji_judge"}, "groups": {"cross_domain": "Everything else"},
        "metrics": {
            "kept_cross_domain": {"type": "seen_rate", "higher_is_better": True, "meaning": "kept"}
        }
        | config.metrics,
    }  # fmt: skip
    (config.output_dir / "suite.yaml").write_text(yaml.safe_dump(table))


def watch(config: Config, stop_at: int | None = None) -> Phase:
    """Run the command; with `stop_at`, kill it once so many pictures are there."""
    folder, found, started = config.output_dir / "run", Phase(), time.monotonic()
    log = open(config.output_dir / "log.txt", "a")  # noqa: SIM115
    suite = str(config.output_dir / "suite.yaml")
    process = subprocess.Popen(
        [sys.executable, "-m", "expunge.cli", "eval", "--suite", suite, "--model", "emoji",
         "--concept", "a bomb", "--output_dir", str(folder), "--processes", str(config.processes),
         *(("--lora", config.lora) if config.lora else ())],
        stdout=log, stderr=log, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
    )  # fmt: skip
    while process.poll() is None:
        there = sum(len(os.listdir(x)) for x in (folder / "images").glob("??"))
        found.pictures.append((time.monotonic() - started, there))
        found.memory.append((there, largest(process.pid)))
        if stop_at is not None and there >= stop_at:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.5)
    found.seconds = time.monotonic() - started
    log.close()
    if stop_at is None and process.returncode:
        raise RuntimeError((config.output_dir / "log.txt").read_text()[-500:])
    return found


def largest(pid: int) -> int:
    try:
        group = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return max(p.memory_info().rss for p in group)
    except psutil.Error:
        return 0


def at(memory: list[tuple[int, int]], pictures: int) -> int:
    return max(size for n, size in memory if n <= pictures)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
