"""Kill an evaluation at random moments, again and again: is anything made twice, lost or changed?

    python scripts/bench/kill_eval.py --output_dir D [--kills 20] [--processes 1]

Evaluates the bundled model whole, then once more with kill -9 at random moments of start,
generation, judging and writing, and compares. Prints one JSON line last; ends with status 1 if
anything differs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from expunge.cli import run
from expunge.configuration import parse


@dataclass(frozen=True)
class Config:
    output_dir: Path
    kills: int = 20
    processes: int = 1
    limit: int = 8
    seed: int = 0


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "scripts/bench/kill_eval.py")
    whole, killed = config.output_dir / "whole", config.output_dir / "killed"
    started = time.monotonic()
    code = start(config, whole).wait()
    if code:
        raise RuntimeError(f"the evaluation ended with {code}")
    lasted = time.monotonic() - started
    draw, known, twice, rounds = random.Random(config.seed), pictures(killed), 0, 0
    done = 0
    while done < config.kills:
        rounds += 1
        process, begun = start(config, killed), time.monotonic()
        try:
            process.wait(draw.uniform(0.0, lasted))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
        else:
            # It came to its end, sooner than one that has all pictures to make.
            lasted = time.monotonic() - begun
            (killed / "report.json").unlink()
        now = pictures(killed)
        twice += sum(now.get(name) != stamp for name, stamp in known.items())
        known = now
    code = start(config, killed).wait()
    now = pictures(killed)
    twice += sum(now.get(name) != stamp for name, stamp in known.items())
    same = {name: content(whole, name) == content(killed, name)
            for name in ("report.json", "scores.json", "report.md", "grid.png")}  # fmt: skip
    lost = len(set(pictures(whole)) - set(now))
    print(json.dumps({
        "kills": done, "processes": config.processes, "rounds": rounds, "pictures": len(now),
        "made_twice_or_changed": twice, "lost": lost, "identical": same, "status": code,
    }))  # fmt: skip
    return int(bool(code or twice or lost or not all(same.values())))


def start(config: Config, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "expunge.cli", "eval", "--model", "emoji", "--concept", "a bomb",
         "--sampler.type", "negative_prompt", "--limit", str(config.limit),
         "--output_dir", str(folder), "--processes", str(config.processes)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """Every picture's file and when it was written; one that is made twice is another file."""
    return {
        file.name: (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in folder.glob("images/??/*.png")
    }


def content(folder: Path, name: str) -> bytes:
    found = (folder / name).read_bytes()
    if name != "report.json":
        return found
    report = json.loads(found)
    for what in ("time", "command"):
        del report["provenance"][what]
    return json.dumps(report).encode()


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
