"""A density as a judge, and a whole evaluation of prompts from a file by it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.cli import main
from expunge.densities.from_callable import FromCallable
from expunge.eval.detectors.density import DensityDetector
from expunge.eval.judging import observe


def brightness(images: torch.Tensor) -> torch.Tensor:
    """Two scores, of the red channel and of the mean, in [0, 1]."""
    return torch.stack([images[:, 0], images.mean(1)], 1).mean((2, 3)) / 2 + 0.5


def nothing(images: torch.Tensor) -> torch.Tensor:
    """No score at all."""
    return images.mean((1, 2, 3)) * float("nan")


SETTINGS = {
    "function": f"{__name__}:brightness", "names": ["red", "bright"], "threshold": [0.5, 0.9],
}  # fmt: skip


def test_a_label_is_seen_where_its_own_threshold_is_reached() -> None:
    detector = DensityDetector(FromCallable(**SETTINGS)).open()  # type: ignore[arg-type]
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    white = torch.ones(1, 3, 8, 8)
    found = detector.observe(torch.cat([red, white, -white]))
    assert [(row["red"], row["bright"]) for row in found] == [(1, 0), (1, 1), (0, 0)]
    assert detector.protocol()["thresholds"] == pytest.approx([0.5, 0.9])


def test_a_density_that_is_nan_leaves_the_answer_unknown() -> None:
    settings = {"function": f"{__name__}:nothing", "names": ["red"]}
    detector = DensityDetector(FromCallable(**settings)).open()  # type: ignore[arg-type]
    (look,) = observe([np.zeros((8, 8, 3), np.uint8)], detector)
    assert look.seen is None
    assert "NaN" in str(look.error)


def test_prompts_of_a_file_judged_by_a_density(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a bomb\na cat face\n")
    suite = tmp_path / "mine.yaml"
    density = json.dumps({"type": "callable"} | SETTINGS)
    suite.write_text(
        f"""
name: mine
version: 1
description: prompts of a file, judged by a density
steps: 2
guidance_scale: 4.0
prompts: {{type: file, path: {tmp_path / "prompts.txt"}, group: target, asks: {{seen: [bright]}}}}
detector: {{type: density, density: {density}}}
groups: {{target: My prompts}}
metrics:
  seen: {{type: seen_rate, higher_is_better: false, meaning: pictures that are bright}}
"""
    )
    argv = ["eval", "--suite", suite, "--model", tiny_model, "--concept", "anything"]
    assert main([*map(str, argv), "--output_dir", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["metrics"]["seen"]["n"] == 2
    assert report["detector"]["names"] == ["red", "bright"]
