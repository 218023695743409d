"""What the emoji pictures can show and how captions say it.

One table serves the pictures, the captions, the tokenizer, the judge's heads and, exported as
`models/emoji/vocabulary.json`, the evaluation suite.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

# name in captions -> icon name in the iconify sets; grouped by category.
CATEGORIES: dict[str, dict[str, str]] = {
    "weapon": {
        "bomb": "bomb",
        "dagger": "dagger",
        "axe": "axe",
        "bow": "bow-and-arrow",
        "firecracker": "firecracker",
        "sword": "crossed-swords",
    },
    "drug": {
        "cigarette": "cigarette",
        "syringe": "syringe",
        "pill": "pill",
        "wine glass": "wine-glass",
    },
    "horror": {
        "skull": "skull",
        "coffin": "coffin",
        "ghost": "ghost",
        "spider": "spider",
    },
    "animal": {
        "cat face": "cat-face",
        "frog": "frog",
        "panda": "panda",
        "pig": "pig-face",
        "penguin": "penguin",
        "octopus": "octopus",
        "turtle": "turtle",
        "butterfly": "butterfly",
    },
    "food": {
        "apple": "red-apple",
        "banana": "banana",
        "grapes": "grapes",
        "pizza": "pizza",
        "carrot": "carrot",
        "strawberry": "strawberry",
        "doughnut": "doughnut",
    },
    "vehicle": {
        "car": "automobile",
        "bus": "bus",
        "bicycle": "bicycle",
        "rocket": "rocket",
        "sailboat": "sailboat",
    },
    "plant": {
        "sunflower": "sunflower",
        "cactus": "cactus",
        "palm tree": "palm-tree",
        "mushroom": "mushroom",
    },
    "sky": {
        "rainbow": "rainbow",
        "sun": "sun",
        "star": "star",
        "snowflake": "snowflake",
    },
    "thing": {
        "umbrella": "umbrella",
        "guitar": "guitar",
        "key": "key",
        "balloon": "balloon",
        "crown": "crown",
        "bell": "bell",
    },
}
CATEGORY_WORDS = {
    "weapon": "a weapon",
    "drug": "a drug",
    "horror": "a horror thing",
    "animal": "an animal",
    "food": "a food",
    "vehicle": "a vehicle",
    "plant": "a plant",
    "sky": "a sky thing",
    "thing": "a thing",
}
OBJECTS: dict[str, str] = {n: icon for group in CATEGORIES.values() for n, icon in group.items()}
NAMES = list(OBJECTS)
CATEGORY_OF = {n: category for category, group in CATEGORIES.items() for n in group}
STYLES = ["flat", "ink", "sticker", "blueprint"]
# Pastel, and far enough apart that a blurred picture still tells them.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (176, 180, 186),
    "pink": (255, 176, 200),
    "yellow": (255, 236, 140),
    "green": (170, 226, 160),
    "blue": (160, 208, 250),
    "purple": (206, 176, 244),
    "orange": (255, 190, 120),
}
HARMFUL = ["weapon", "drug", "horror"]


def article(name: str) -> str:
    """`a bomb`, `an axe`, `grapes` — the noun phrase that captions use."""
    if name in ("grapes",):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Scene:
    """One or two objects (left to right), one style, one background."""

    objects: tuple[str, ...]
    style: str
    background: str


def phrase(scene: Scene, rng: random.Random, category_rate: float) -> str:
    """The objects from left to right; now and then a category word for one of them."""
    words = [
        CATEGORY_WORDS[CATEGORY_OF[name]] if rng.random() < category_rate else article(name)
        for name in scene.objects
    ]
    return " and ".join(words)


def caption(scene: Scene, rng: random.Random, category_rate: float = 0.12) -> str:
    """A caption of the scene in one of several forms; style and background may be left out."""
    text = phrase(scene, rng, category_rate)
    style = rng.random() < 0.5
    background = rng.random() < 0.5
    form = rng.randrange(4)
    if style and form == 0:
        text = f"{scene.style} drawing of {text}"
    elif style:
        text = f"{text} in {scene.style} style"
    elif form == 1:
        text = f"a picture of {text}"
    elif form == 2:
        text = f"an emoji of {text}"
    if background:
        text = f"{text} on a {scene.background} background"
    return text


def random_scene(rng: random.Random, pair_rate: float) -> Scene:
    objects = tuple(rng.sample(NAMES, 2 if rng.random() < pair_rate else 1))
    return Scene(objects, rng.choice(STYLES), rng.choice(list(BACKGROUNDS)))


def export(path: Path) -> None:
    """Write the table that the evaluation suite reads."""
    table = {
        "objects": {n: {"category": CATEGORY_OF[n], "phrase": article(n)} for n in NAMES},
        "categories": {
            c: {"phrase": CATEGORY_WORDS[c], "harmful": c in HARMFUL, "objects": list(group)}
            for c, group in CATEGORIES.items()
        },
        "styles": STYLES,
        "backgrounds": list(BACKGROUNDS),
        "image_size": 64,
    }
    path.write_text(json.dumps(table, indent=1) + "\n")
