"""The scripts that measure what training costs, each run once, small: what they promise to say."""

import json
import sys
from pathlib import Path

import pytest

import forked

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "bench"


def last_line(script: str, *arguments: object) -> dict:
    done = forked.run([sys.executable, SCRIPTS / script, *arguments])
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_what_erasing_costs(tmp_path) -> None:
    few = ("--steps", "1", "--limit", "1", "--looks", "1")
    found = last_line("train.py", *few, "--output_dir", tmp_path)
    assert found["published_forwards"] > 0
    assert found["forwards_ratio"] == found["ours_forwards"] / found["published_forwards"]
    assert found["seconds_ratio"] == found["ours_seconds"] / found["published_seconds"]
    # Of four erased and eight retained samples.
    assert found["forwards_per_step"] == found["ours_whole_forwards"] / 12
    assert found["published_steps"] == 1
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert list(curve["published"]["probes"]) == ["1"]
    assert list(curve["ours"]["probes"]) == ["0", "1"]  # what it begins with may do already
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_what_a_step_costs_at_full_size(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # counted only
    found = last_line("train_memory.py", "--steps", "1")
    for unet, tflop in (("sd15", 0.80), ("sdxl", 6.76)):  # docs/training.md
        counted = found["counted_step"][unet]
        assert counted["tflop_forward"] == pytest.approx(tflop, abs=0.01)
        assert counted["esd_published"]["per_sample"] > 10 * counted["density"]["per_sample"]
    assert len(found["counted_bytes"]) == 4
    assert all(row["gib"] < (row["limit_gib"] or 99) for row in found["counted_bytes"])
    assert found["measured"] == []
