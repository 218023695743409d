"""Detectors: independent judges that say what a picture shows."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from expunge.registry import Entry, Registry
from expunge.results import sha256_json

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.eval.cases import Observation

DETECTORS = Registry(
    "detector",
    {
        "emoji_judge": Entry(
            "expunge.eval.detectors.emoji_detector:EmojiDetector",
            "the independent judge of the bundled emoji model: objects, style, background",
        ),
        "density": Entry(
            "expunge.eval.detectors.density:DensityDetector",
            "a harm density as a judge: SD's checker, Q16, a probe, texts of another CLIP",
        ),
        "nudenet": Entry(
            "expunge.eval.detectors.nudenet_detector:NudeNet",
            "NudeNet v3: boxes of 18 body parts, nudity under a named protocol",
        ),
        "open_nsfw": Entry(
            "expunge.eval.detectors.open_nsfw:OpenNsfw",
            "Yahoo's Open-NSFW: one score for the whole picture",
        ),
        "q16": Entry(
            "expunge.eval.detectors.q16:Q16",
            "Q16: inappropriate or not, by two prompt vectors on CLIP",
        ),
        "clip_heads": Entry(
            "expunge.eval.detectors.clip_heads:ClipHeads",
            "trained heads on one CLIP: the multi-headed safety classifier, linear probes",
        ),
        "zero_shot_clip": Entry(
            "expunge.eval.detectors.zero_shot_clip:ZeroShotClip",
            "labels in words: softmax over the cosines of a CLIP",
        ),
        "classifier": Entry(
            "expunge.eval.detectors.classifier:Classifier",
            "any image classifier of transformers, from a folder or the hub",
        ),
    },
)


class Detector(Protocol):
    """What the harness needs of a judge."""

    threshold: float
    """A label counts as seen from this score on."""

    def open(self) -> "OpenDetector":
        """Load the weights; what is missing is a `UserError`."""


class OpenDetector(Protocol):
    """A judge whose weights are loaded."""

    labels: frozenset[str]
    """Every label that an observation holds."""

    def protocol(self) -> dict[str, Any]:
        """All that determines its answers, as JSON values.

        `name` is short, for `protocol_id`; the table's name for it is `detector`. `version` rises
        whenever our own code comes to answer otherwise; without one it is 1. Where there are any:
        `weights` (their SHA-256), `clips` (the eyes of all CLIPs that it sees through, so that
        none judges what it guided), `label set`, `threshold`, `colour order`, and `unusual`, other
        settings that change answers and are not the defaults.
        """

    def observe(self, images: "Tensor") -> "list[Observation]":
        """Scores of all labels for pictures (B, 3, H, W) in [-1, 1]."""


def protocol_id(protocol: Mapping[str, Any]) -> str:
    """What names a metric's judge: `nudenet-320n@c15d8273:version=1:strict6>=0.6:rgb`.

    Two detectors that may answer differently have two ids: the weights stand in it by their hash,
    then the version of our code, the labels with their threshold, the order of colours, and every
    unusual setting.

    Args:
        protocol: What `OpenDetector.protocol` says.
    """
    weights = protocol.get("weights")
    parts = [f"{protocol['name']}@{weights[:8]}" if weights else str(protocol["name"])]
    parts.append(f"version={protocol.get('version', 1)}")
    labels, threshold = protocol.get("label set", "all"), protocol.get("threshold")
    parts.append(labels if threshold is None else f"{labels}>={_number(threshold)}")
    if "colour order" in protocol:
        parts.append(protocol["colour order"])
    parts += [f"{key}={_number(v)}" for key, v in sorted(protocol.get("unusual", {}).items())]
    return ":".join(parts).replace(" ", "-")


def label_set(labels: Iterable[str], meaning: Any = None) -> str:
    """A short name of labels: all of them if they are few, else their number and a hash.

    Args:
        labels: The labels.
        meaning: A JSON value that makes them what they are, such as their texts.
    """
    names = sorted(labels)
    joined = "+".join(names)
    if len(joined) <= 48 and meaning is None:
        return joined
    digest = sha256_json([names, meaning])[:8]
    return f"{joined if len(joined) <= 48 else f'{len(names)} labels'}~{digest}"


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that would see everything, or nothing.

    Raises:
        ValueError: It is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"got threshold {threshold}; allowed: a number in (0, 1]")


def finite(scores: "Observation") -> "Observation":
    """The scores, if something can be said of them.

    Raises:
        FloatingPointError: One is NaN or infinite; it is never taken for "not seen".
    """
    for label, score in scores.items():
        if not math.isfinite(score):
            raise FloatingPointError(f"the detector gave {score} for {label}")
    return scores


def _number(value: Any) -> str:
    # Seven digits are what a float32 keeps of what was asked for.
    return f"{value:.7g}" if isinstance(value, float) else str(value)
