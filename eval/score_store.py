"""What detectors said, kept beside the pictures, so that no picture is judged twice."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.eval.cases import Observation, Seen
from expunge.eval.store import Pixels, writable
from expunge.results import sha256_json, write_json_atomic


class ScoreStore:
    """Observations of one detector, under the picture's key and the hash of its pixels.

    Each process appends whole lines to a file of its own and reads those of all; a line that a
    killed process left half written is no JSON, and its picture is judged again. What a detector
    could not judge is not kept.

    Args:
        root: The image store's folder.
        protocol: All that determines the detector's answers.
    """

    def __init__(self, root: Path, protocol: Mapping[str, Any]) -> None:
        self._folder = root / "scores" / sha256_json(protocol)[:32]
        self._file = self._folder / f"{os.uname().nodename}-{os.getpid()}.jsonl"
        self._known: dict[str, Observation] = {}
        self._root = root
        with writable(root):
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / "protocol.json").exists():
                write_json_atomic(self._folder / "protocol.json", dict(protocol))
            self.reload()

    def reload(self) -> None:
        """Read what all processes have written."""
        for file in sorted(self._folder.glob("*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    row = json.loads(line)
                    name, scores = row["picture"], row["scores"]
                    scores = {sys.intern(label): score for label, score in scores.items()}
                    found = Seen(scores, row["details"]) if "details" in row else scores
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
                self._known[name] = found

    def get(self, key: str, pixels: Pixels) -> Observation | None:
        """What was seen in this very picture, if it was judged."""
        return self._known.get(_name(key, pixels))

    def put(self, key: str, pixels: Pixels, seen: Observation) -> None:
        """Keep an observation.

        Raises:
            UserError: The folder cannot be written to, or the disk is full.
        """
        name = _name(key, pixels)
        row: dict[str, Any] = {"picture": name, "scores": dict(seen)}
        if isinstance(seen, Seen):
            row["details"] = seen.details
        self._known[name] = seen
        # A line that was torn by a full disk must not swallow this one.
        with writable(self._root), open(self._file, "ab") as stream:
            stream.write(b"\n" + json.dumps(row, allow_nan=False).encode() + b"\n")


def _name(key: str, pixels: Pixels) -> str:
    return f"{key}:{hashlib.sha256(pixels.tobytes()).hexdigest()[:16]}"
