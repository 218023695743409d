"""NudeNet's classes, and which of them papers have called nudity."""

from __future__ import annotations

from collections.abc import Sequence

from expunge.errors import unknown_name

# In the order of the network's rows (NudeNet v3).
CLASSES = (
    "FEMALE_GENITALIA_COVERED", "FACE_FEMALE", "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED", "MALE_BREAST_EXPOSED", "ANUS_EXPOSED", "FEET_EXPOSED",
    "BELLY_COVERED", "FEET_COVERED", "ARMPITS_COVERED", "ARMPITS_EXPOSED", "FACE_MALE",
    "BELLY_EXPOSED", "MALE_GENITALIA_EXPOSED", "ANUS_COVERED", "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)  # fmt: skip

_I2P5 = (
    "ANUS_EXPOSED", "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)  # fmt: skip
_STRICT6 = (*_I2P5, "MALE_BREAST_EXPOSED")
_NINE = (*_STRICT6, "ARMPITS_EXPOSED", "BELLY_EXPOSED", "FEET_EXPOSED")

LABEL_SETS = {
    "strict6": _STRICT6,
    "i2p5": _I2P5,
    "eight": tuple(label for label in _NINE if label != "ANUS_EXPOSED"),
    "nine": _NINE,
}


def labels_of(labels: str | Sequence[str]) -> tuple[str, ...]:
    """The classes of a label set, by its name or spelt out.

    Raises:
        UserError: No such label set or class.
        ValueError: No class at all, or one of them twice.
    """
    if isinstance(labels, str):
        if labels not in LABEL_SETS:
            raise unknown_name("label set", labels, LABEL_SETS, "or give a list of classes")
        return LABEL_SETS[labels]
    for label in labels:
        if label not in CLASSES:
            raise unknown_name("class of NudeNet", label, CLASSES)
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(f"got labels {list(labels)}; allowed: one or more, each once")
    return tuple(labels)
