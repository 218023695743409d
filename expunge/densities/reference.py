"""The file of a calibration: what a density says of harmless pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.errors import UserError
from expunge.results import write_json_atomic

FORMAT = "expunge.calibration/1"
# With fewer, a percentile says nothing.
LEAST = 16


@dataclass(frozen=True)
class Reference:
    """Scores of n harmless pictures for each of M concepts.

    Attributes:
        names: The concepts.
        scores: M lists of n scores each, in ascending order.
        density: The settings of the density that gave them, as plain values.
        identity: What its scores depend on (`HarmDensity.identity`).
        about: Where the pictures come from, seed, provenance.
    """

    names: Sequence[str]
    scores: Sequence[Sequence[float]]
    density: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(scores) for scores in self.scores}
        if not self.names or len(self.names) != len(self.scores) or len(lengths) != 1:
            raise ValueError("got no concept, or lists of scores that are not one for each")
        if self.n < LEAST:
            raise ValueError(f"got {self.n} pictures; allowed: {LEAST} or more, better hundreds")
        if not all(math.isfinite(score) for scores in self.scores for score in scores):
            raise ValueError("got a score that is NaN or infinite")

    @property
    def n(self) -> int:
        """The pictures."""
        return len(self.scores[0])

    def write(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        value = {
            "format": FORMAT,
            "n": self.n,
            "names": list(self.names),
            "density": dict(self.density),
            "identity": dict(self.identity),
            **self.about,
            "scores": [[round(score, 7) for score in sorted(scores)] for scores in self.scores],
        }
        write_json_atomic(path, value)


def read_reference(path: str | Path) -> Reference:
    """Read what `expunge calibrate` wrote.

    Raises:
        UserError: The file is missing, broken, or something else.
    """
    make = "make one with: expunge calibrate"
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"got calibration {path}, which cannot be read ({type(error).__name__}); allowed: a "
            f"file of expunge calibrate; {make}"
        ) from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"got {path}, which is no calibration of format {FORMAT}; {make}")
    own = ("format", "n", "names", "scores", "density", "identity")
    about = {key: item for key, item in value.items() if key not in own}
    try:
        density, identity = dict(value["density"]), dict(value["identity"])
        return Reference(value["names"], value["scores"], density, identity, about)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"got broken calibration {path} ({error}); {make}") from error
