"""Compose scenes: one or two sprites on a plain background, as uint8 pictures of 64 × 64."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from sprites import PAIR_SIZES, SINGLE_SIZES, sprites
from vocabulary import BACKGROUNDS, Scene, random_scene

SIZE = 64


class Composer:
    """Draws scenes from sprites that are rasterised once."""

    def __init__(self, cache: Path):
        self.sprites = sprites(cache)

    def __call__(self, scene: Scene, rng: random.Random) -> np.ndarray:
        """(64, 64, 3) uint8; the objects stand left to right in the order of `scene.objects`."""
        picture = np.empty((SIZE, SIZE, 3), np.float32)
        tint = np.array([rng.uniform(-4, 4) for _ in range(3)], np.float32)
        picture[:] = np.clip(np.array(BACKGROUNDS[scene.background], np.float32) + tint, 0, 255)
        pair = len(scene.objects) == 2
        for index, name in enumerate(scene.objects):
            size = rng.choice(PAIR_SIZES if pair else SINGLE_SIZES)
            room = 1 if pair else 4
            x = (16 + 32 * index if pair else 32) - size // 2 + rng.randint(-room, room)
            y = 32 - size // 2 + rng.randint(-6 if pair else -4, 6 if pair else 4)
            x, y = max(0, min(SIZE - size, x)), max(0, min(SIZE - size, y))
            art = self.sprites[name, scene.style, size]
            patch = picture[y : y + size, x : x + size]
            patch += art[..., 3:] * (art[..., :3] * 255 - patch)
        return picture.round().clip(0, 255).astype(np.uint8)


def draw_scenes(
    cache: Path, count: int, seed: int, pair_rate: float
) -> tuple[np.ndarray, list[Scene]]:
    """`count` random scenes: (count, 64, 64, 3) uint8 pictures and what they show."""
    compose, rng = Composer(cache), random.Random(seed)
    scenes = [random_scene(rng, pair_rate) for _ in range(count)]
    return np.stack([compose(scene, rng) for scene in scenes]), scenes
