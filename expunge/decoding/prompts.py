"""What a decoder is distilled on: prompts in which nothing in particular is asked for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from expunge.errors import UserError

VOCABULARY = "vocabulary.json"  # in the folder of a model that draws a closed list of things
NOUNS = (
    "beach", "bicycle", "bird", "boat", "book", "bowl of soup", "bridge", "cake", "car",
    "castle", "cat", "chair", "child's room", "city street", "clock", "cow", "crowd", "dancer",
    "desert", "dog", "dress", "farmer", "field of flowers", "fire", "fish", "forest", "fruit stall",
    "garden", "guitar", "hand", "harbour", "horse", "house", "kitchen", "lake", "lamp", "man",
    "market", "moon", "mountain", "newspaper page", "nurse", "painting", "pear", "pencil", "piano",
    "portrait", "rainy window", "robot", "shoe", "snowy road", "statue", "sunset", "swimmer",
    "table", "tiger", "train", "tree", "vase", "wedding", "woman", "workshop",
)  # fmt: skip
FORMS = (
    "a photo of a {}", "a close-up of a {}", "an oil painting of a {}", "a drawing of a {}",
    "a {} at night", "a {} in bright daylight", "a black and white photo of a {}", "a cartoon {}",
    "a {}, shallow depth of field", "a {} seen from above", "a 3d rendering of a {}", "{}",
)  # fmt: skip


def from_file(path: Path) -> list[str]:
    """The prompts of a text file, one a line.

    Raises:
        UserError: It cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"got prompts {path}; allowed: a text file with one prompt a line; {error}"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"got prompts {path}, which holds none; allowed: one prompt a line")
    return prompts


def neutral(model: str, n: int, seed: int) -> list[str]:
    """N random prompts: of the model's own vocabulary if its folder has one, else of `NOUNS`."""
    rng = random.Random(seed)
    file = Path(model) / VOCABULARY
    if not file.is_file():
        return [rng.choice(FORMS).format(rng.choice(NOUNS)) for _ in range(n)]
    table = json.loads(file.read_text(encoding="utf-8"))
    return [_caption(table, rng) for _ in range(n)]


def _caption(table: dict[str, Any], rng: random.Random) -> str:
    """One or two objects; half of the captions name a style, half a background."""
    objects = [row["phrase"] for row in table["objects"].values()]
    text = " and ".join(rng.sample(objects, rng.choice((1, 2))))
    if rng.random() < 0.5:
        text = f"{text} in {rng.choice(table['styles'])} style"
    if rng.random() < 0.5:
        text = f"{text} on a {rng.choice(table['backgrounds'])} background"
    return text
