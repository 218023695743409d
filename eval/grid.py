"""A contact sheet: base above erased at the same seeds, framed by what the judge says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from expunge.eval.store import Pixels

TILE = 128
_GAP = 10
_MARGIN = 28
_LABEL = 76
_LEAST_WIDTH = 760
_INK = "#1f2328"
_QUIET = "#656d76"
_FRAME = {True: "#2da44e", False: "#cf222e", None: "#8c959f"}
_LEGEND = (
    "green frame: as wanted · red frame, cross: shows what should be gone, or lacks what "
    "should be there · gray frame, stroke: could not be judged"
)


@dataclass(frozen=True)
class Cell:
    """A picture (H, W, 3), or None where there is none, and whether it is as wanted."""

    pixels: Pixels | None
    wanted: bool | None


@dataclass(frozen=True)
class Section:
    """Pictures of the same prompts by every model.

    Attributes:
        title: What the pictures are of.
        note: What was measured on them.
        captions: N prompts.
        rows: Model -> N cells.
    """

    title: str
    note: str
    captions: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]


def contact_sheet(title: str, subtitle: str, sections: Sequence[Section]) -> Image.Image:
    """Draw sections one below the other, a column for each prompt."""
    columns = max((len(section.captions) for section in sections), default=1)
    width = max(2 * _MARGIN + _LABEL + columns * (TILE + _GAP) - _GAP, _LEAST_WIDTH)
    # Laid out on a sheet that is surely tall enough, then cut.
    rows = sum(len(section.rows) for section in sections)
    sheet = Image.new("RGB", (width, 200 + 200 * len(sections) + rows * (TILE + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    y = _MARGIN
    for line in _wrap(title, _font(26), width - 2 * _MARGIN):
        draw.text((_MARGIN, y), line, _INK, _font(26))
        y += 36
    for line in _wrap(subtitle, _font(14), width - 2 * _MARGIN):
        draw.text((_MARGIN, y), line, _QUIET, _font(14))
        y += 20
    for section in sections:
        y = _draw_section(sheet, draw, section, y + 18)
    y += 14
    for line in _wrap(_LEGEND, _font(13), width - 2 * _MARGIN):
        draw.text((_MARGIN, y), line, _QUIET, _font(13))
        y += 18
    return sheet.crop((0, 0, width, y + _MARGIN - 6))


def _draw_section(sheet: Image.Image, draw: ImageDraw.ImageDraw, section: Section, y: int) -> int:
    font = _font(18)
    draw.text((_MARGIN, y), section.title, _INK, font)
    after = _MARGIN + int(font.getlength(section.title)) + 14
    draw.text((after, y + 3), section.note, _QUIET, _font(14))
    y += 30
    left = _MARGIN + _LABEL
    captions = [_wrap(caption, _font(12), TILE) for caption in section.captions]
    height = 15 * max(map(len, captions), default=0)
    for column, lines in enumerate(captions):
        # Captions stand on the pictures, whatever their number of lines.
        top = y + height - 15 * len(lines)
        for i, line in enumerate(lines):
            x = left + column * (TILE + _GAP) + (TILE - _font(12).getlength(line)) / 2
            draw.text((x, top + 15 * i), line, _QUIET, _font(12))
    y += height + 6
    for name, cells in section.rows.items():
        draw.text((_MARGIN, y + TILE / 2 - 9), name, _INK, _font(15))
        for column, cell in enumerate(cells):
            _draw_cell(sheet, draw, cell, left + column * (TILE + _GAP), y)
        y += TILE + _GAP
    return y


def _draw_cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, x: int, y: int) -> None:
    if cell.pixels is None:
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), "#eaeef2")
    else:
        image = Image.fromarray(cell.pixels)
        enlarge = max(image.size) <= TILE
        scale = TILE // max(image.size) if enlarge else TILE / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        method = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
        place = (x + (TILE - size[0]) // 2, y + (TILE - size[1]) // 2)
        sheet.paste(image.resize(size, method), place)
    colour = _FRAME[cell.wanted]
    draw.rectangle((x - 3, y - 3, x + TILE + 2, y + TILE + 2), None, colour, 3)
    if cell.wanted is not True:
        # Not everybody tells red from green.
        left, right, top, bottom = x + TILE - 13, x + TILE - 4, y + 4, y + 13
        draw.rectangle((left - 4, y, x + TILE, bottom + 4), colour)
        draw.line((left, bottom, right, top), "white", 2)
        if cell.wanted is False:
            draw.line((left, top, right, bottom), "white", 2)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    measure: Callable[[str], float] = font.getlength
    for word in text.split():
        if lines and measure(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType, which draws the captions")
    return font
