"""One training as a cell of a table: killed, it begins anew; there already, it is read again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tables import require_same

from expunge.configuration import load, parse
from expunge.errors import UserError
from expunge.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def trained(
    config: Path, settings: Mapping[str, Any], folder: Path, threads: int
) -> dict[str, Any]:
    """What train_result.json says.

    Args:
        config: File that the training starts from.
        settings: What else it is told.
        folder: Where its LoRA is put.
        threads: Of the processor.

    Raises:
        UserError: It failed, or the folder has a training of other settings.
    """
    told = {"checkpoint_every": 0, "validation.prompts": ["a key"], "validation.seeds": 1}
    arguments = ["--config", str(config)]
    for key, value in (dict(settings) | told | {"output_dir": str(folder)}).items():
        arguments += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    result = folder / "train_result.json"
    if result.exists():
        require_same(
            folder, load(TrainConfig, folder / "config.yaml"), parse(TrainConfig, arguments)
        )
    else:
        arguments += ["--overwrite", "true"] if folder.exists() else []
        command = [sys.executable, str(ROOT / "train_erase.py"), *arguments]
        own = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=own)
        if done.returncode:
            raise UserError(f"the training of {folder} failed: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found
