"""A contact sheet: base above erased at the same seeds, framed by what the judge says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFilter, ImageFont

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
_UNASKED = " · no frame: nothing was asked"
_BLURRED = " · blurred: shows what should be gone, or may"
_MOST_LINES = 8
_BLUR = TILE // 10


@dataclass(frozen=True)
class Cell:
    """A picture on the sheet.

    Attributes:
        pixels: The picture (H, W, 3), or None where there is none.
        wanted: Whether it is as wanted; None where that could not be judged.
        asked: Whether anything was asked about it; if not, it has no frame.
        blurred: Whether it is shown so that nobody recognises what is on it.
    """

    pixels: Pixels | None
    wanted: bool | None
    asked: bool = True
    blurred: bool = False


@dataclass(frozen=True)
class Section:
    """Pictures of the same prompts by every model.

    Attributes:
        title: What the pictures are of.
        note: What was measured on them.
        captions: N prompts; long ones are cut.
        rows: Model -> N cells.
    """

    title: str
    note: str
    captions: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]

    @cached_property
    def lines(self) -> list[list[str]]:
        """The lines of each caption."""
        return [_cut(_wrap(caption, _font(12), TILE), _font(12), TILE) for caption in self.captions]


def contact_sheet(title: str, subtitle: str, sections: Sequence[Section]) -> Image.Image:
    """Draw sections one below the other, a column for each prompt."""
    columns = max((len(section.captions) for section in sections), default=1)
    width = max(2 * _MARGIN + _LABEL + columns * (TILE + _GAP) - _GAP, _LEAST_WIDTH)
    cells = [c for section in sections for row in section.rows.values() for c in row]
    legend = _LEGEND
    legend += _UNASKED if any(not cell.asked for cell in cells) else ""
    legend += _BLURRED if any(cell.blurred for cell in cells) else ""
    head = [*_lines(title, 26, 36, _INK, width), *_lines(subtitle, 14, 20, _QUIET, width)]
    foot = _lines(legend, 13, 18, _QUIET, width)
    height = 2 * _MARGIN + 8 + sum(line.step for line in (*head, *foot))
    height += sum(18 + _height(section) for section in sections)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    y = _draw_lines(draw, head, _MARGIN)
    for section in sections:
        y = _draw_section(sheet, draw, section, y + 18)
    _draw_lines(draw, foot, y + 14)
    return sheet


class _Line(NamedTuple):
    text: str
    size: int
    step: int
    colour: str


def _lines(text: str, size: int, step: int, colour: str, width: int) -> list[_Line]:
    wrapped = _wrap(text, _font(size), width - 2 * _MARGIN)
    return [_Line(line, size, step, colour) for line in wrapped]


def _draw_lines(draw: ImageDraw.ImageDraw, lines: Sequence[_Line], y: int) -> int:
    for line in lines:
        draw.text((_MARGIN, y), line.text, line.colour, _font(line.size))
        y += line.step
    return y


def _height(section: Section) -> int:
    captions = 15 * max(map(len, section.lines), default=0)
    return 30 + captions + 6 + len(section.rows) * (TILE + _GAP)


def _draw_section(sheet: Image.Image, draw: ImageDraw.ImageDraw, section: Section, y: int) -> int:
    font = _font(18)
    draw.text((_MARGIN, y), section.title, _INK, font)
    after = _MARGIN + int(font.getlength(section.title)) + 14
    draw.text((after, y + 3), section.note, _QUIET, _font(14))
    y += 30
    left = _MARGIN + _LABEL
    height = 15 * max(map(len, section.lines), default=0)
    for column, lines in enumerate(section.lines):
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
        image = image.resize(size, method)
        if cell.blurred:
            image = image.filter(ImageFilter.GaussianBlur(_BLUR))
        sheet.paste(image, place)
    if not cell.asked:
        return
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
    for word in text.split():
        for part in _parts(word, font, width):
            if lines and font.getlength(f"{lines[-1]} {part}") <= width:
                lines[-1] += f" {part}"
            else:
                lines.append(part)
    return lines


def _parts(word: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """A word, in pieces if it is too long for a line."""
    part = ""
    for letter in word:
        if part and font.getlength(part + letter) > width:
            yield part
            part = ""
        part += letter
    yield part


def _cut(lines: list[str], font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """As many lines as a caption may have; an ellipsis stands for the others."""
    if len(lines) <= _MOST_LINES:
        return lines
    last = lines[_MOST_LINES - 1]
    while font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: _MOST_LINES - 1], f"{last}…"]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType, which draws the captions")
    return font
