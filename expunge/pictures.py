"""Tensors to pictures and back, and pictures to labelled sheets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from expunge.errors import UserError
from expunge.results import temporary_beside

GAP = 6
LINE = 16
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
GRID = "grid.png"


def to_pil(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) in [-1, 1] as 8-bit RGB."""
    array = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array.astype(np.uint8))


def picture_files(folder: str | Path) -> list[Path]:
    """The pictures of a folder, by name; the sheet that `expunge sample` adds is none of them.

    Raises:
        UserError: No such folder, or no picture in it.
    """
    if not Path(folder).is_dir():
        raise UserError(f"got {folder}, which is no folder; allowed: a folder of pictures")
    files = sorted(
        file
        for file in Path(folder).iterdir()
        if file.suffix.lower() in SUFFIXES and file.name[0] != "." and file.name != GRID
    )
    if not files:
        raise UserError(
            f"got folder {folder}, which holds no picture; allowed: {', '.join(SUFFIXES)}"
        )
    return files


def read_picture(path: str | Path) -> Tensor:
    """A picture file as (3, H, W) in [-1, 1], upright, what is transparent in white.

    Raises:
        UserError: The file is missing or broken, or does not say which number is white.
    """
    try:
        with Image.open(path) as stored:
            upright = ImageOps.exif_transpose(stored)
            # A PNG has at most 16 bits, which some versions of Pillow hold in 32.
            if upright.mode.startswith("I;16") or (upright.mode, stored.format) == ("I", "PNG"):
                upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
            image = upright.convert("RGBA")
    # Pillow has an error of its own for every format that can be broken.
    except Exception as error:
        raise UserError(
            f"got picture {path}, which cannot be read ({type(error).__name__}); allowed: a whole "
            "picture file; replace or remove it"
        ) from error
    if upright.mode in ("I", "F"):
        raise UserError(
            f"got picture {path} of mode {upright.mode}, whose numbers have no known white; "
            "allowed: 8 or 16 bits a channel; convert it"
        )
    white = Image.new("RGBA", image.size, "white")
    array = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1


def save_png(image: Image.Image, path: Path) -> None:
    """Write under a temporary name, then rename: a picture is there whole or not at all."""
    temporary = temporary_beside(path)
    try:
        image.save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sheet(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], width: int = 128
) -> Image.Image:
    """Rows of pictures, each under its label; small pictures are enlarged to `width`."""
    if len(rows) != len(labels):
        raise ValueError(f"got {len(rows)} rows and {len(labels)} labels")
    columns = max(map(len, rows))
    font = ImageFont.load_default(12)
    height = max(round(width * image.height / image.width) for row in rows for image in row)
    step = LINE + height + GAP
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, len(rows) * step + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        draw.text((GAP, y * step + 2), label, fill=(40, 40, 40), font=font)
        for x, image in enumerate(row):
            # Emoji at 64 px stay crisp when their pixels are simply repeated.
            method = Image.Resampling.NEAREST if image.width < width else Image.Resampling.LANCZOS
            size = (width, round(width * image.height / image.width))
            canvas.paste(
                image.resize(size, method), (GAP + x * (width + GAP), y * step + LINE + GAP // 2)
            )
    return canvas
