"""Draw the object sprites: four icon sets, one per style, each style telling itself apart at 64 px.

The icon sets come from the npm packages of iconify, pinned by version and checksum. The drawings
are not committed; `MODEL_CARD.md` carries their licences.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from vocabulary import NAMES, OBJECTS, STYLES

SETS = {
    "noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "fluent-emoji-high-contrast": (
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
}
STYLE_SET = {
    "flat": "twemoji",
    "ink": "fluent-emoji-high-contrast",
    "sticker": "noto",
    "blueprint": "fluent-emoji-flat",
}
SINGLE_SIZES = (42, 46, 50)
PAIR_SIZES = (28, 30)
CANVAS = 160  # drawn large, so that borders are smooth after the reduction


def fetch(cache: Path) -> dict[str, dict]:
    """Download the icon packages with npm (once) and return their parsed `icons.json`."""
    cache.mkdir(parents=True, exist_ok=True)
    icons = {}
    for name, (version, sha256) in SETS.items():
        archive = cache / f"iconify-json-{name}-{version}.tgz"
        if not archive.exists():
            subprocess.run(
                ["npm", "pack", "--silent", f"@iconify-json/{name}@{version}"],
                cwd=cache,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != sha256:
            raise SystemExit(f"{archive.name}: sha256 {found}, expected {sha256}")
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            assert member is not None
            icons[name] = json.load(member)
    return icons


def draw(icon_set: dict, name: str, color: str, size: int) -> Image.Image:
    """Rasterise one icon to an RGBA picture of `size` × `size`."""
    import resvg_py

    icon = icon_set["icons"].get(name) or icon_set["icons"][icon_set["aliases"][name]["parent"]]
    width = icon.get("width", icon_set["width"])
    height = icon.get("height", icon_set["height"])
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="0 0 {width} {height}" color="{color}">'
        f"{icon['body']}</svg>"
    ).replace("currentColor", color)
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def sprite(icons: dict[str, dict], name: str, style: str) -> Image.Image:
    """One object in one style on a transparent canvas of CANVAS pixels."""
    icon_set, icon = icons[STYLE_SET[style]], OBJECTS[name]
    if style == "flat":
        return draw(icon_set, icon, "#000", CANVAS)
    if style == "ink":
        return draw(icon_set, icon, "#15151f", CANVAS)
    canvas = Image.new("RGBA", (CANVAS, CANVAS))
    inner = int(CANVAS * 0.80)
    art = draw(icon_set, icon, "#fff", inner)
    offset = ((CANVAS - inner) // 2,) * 2
    if style == "sticker":  # a broad white rim and a thin dark cut line
        alpha = Image.new("L", canvas.size)
        alpha.paste(art.getchannel("A"), offset)
        rim = alpha.filter(ImageFilter.MaxFilter(17)).filter(ImageFilter.GaussianBlur(1.5))
        line = alpha.filter(ImageFilter.MaxFilter(27)).filter(ImageFilter.GaussianBlur(1.5))
        canvas.paste(Image.new("RGBA", canvas.size, (60, 60, 70, 255)), mask=line)
        canvas.paste(Image.new("RGBA", canvas.size, (255, 255, 255, 255)), mask=rim)
        canvas.alpha_composite(_padded(art, canvas.size, offset))
        return canvas
    # blueprint: a blue tile, the drawing in shades from blue to white
    from PIL import ImageDraw

    ImageDraw.Draw(canvas).rounded_rectangle(
        (4, 4, CANVAS - 4, CANVAS - 4), CANVAS // 8, fill=(28, 64, 150, 255)
    )
    rgba = np.asarray(art, np.float32)
    light = (rgba[..., :3] @ np.array([0.3, 0.59, 0.11], np.float32)) / 255
    ink = (0.35 + 0.65 * light)[..., None]
    tint = np.array([28, 64, 150], np.float32) * (1 - ink) + 255 * ink
    art = Image.fromarray(np.dstack([tint, rgba[..., 3]]).astype(np.uint8), "RGBA")
    canvas.alpha_composite(_padded(art, canvas.size, offset))
    return canvas


def _padded(art: Image.Image, size: tuple[int, int], offset: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGBA", size)
    canvas.paste(art, offset)
    return canvas


def sprites(cache: Path) -> dict[tuple[str, str, int], np.ndarray]:
    """(object, style, size) -> float32 RGBA in [0, 1] of shape (size, size, 4)."""
    icons = fetch(cache)
    table = {}
    for name in NAMES:
        for style in STYLES:
            large = sprite(icons, name, style)
            for size in SINGLE_SIZES + PAIR_SIZES:
                small = large.resize((size, size), Image.Resampling.LANCZOS)
                table[name, style, size] = np.asarray(small, np.float32) / 255
    return table
