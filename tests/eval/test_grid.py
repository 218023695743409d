import numpy as np
from PIL import Image

from expunge.eval.grid import TILE, Cell, Section, contact_sheet


def colours(sheet: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(c) for c in np.array(sheet).reshape(-1, 3).tolist()}


def section(size: int, *wanted: bool | None) -> Section:
    pixels = np.full((size, size, 3), (10, 20, 30), np.uint8)
    cells = [Cell(pixels, w) for w in wanted]
    captions = ["a very long caption of a bomb in blueprint style on a orange background"] * len(
        cells
    )
    return Section("title", "note", captions, {"base": cells, "erased": cells})


def test_small_pictures_are_enlarged_and_large_ones_shrunk_to_the_same_tiles() -> None:
    for size in (32, 64, 128, 512):
        pixels = np.array(contact_sheet("title", "text", [section(size, True, True)]))
        assert (pixels == (10, 20, 30)).all(2).sum() == 4 * TILE * TILE


def test_frames_tell_what_is_wanted() -> None:
    frames = {True: (0x2D, 0xA4, 0x4E), False: (0xCF, 0x22, 0x2E), None: (0x8C, 0x95, 0x9F)}
    for wanted, colour in frames.items():
        found = colours(contact_sheet("title", "text", [section(64, wanted)]))
        assert [c for c in frames.values() if c in found] == [colour]


def test_a_missing_picture_is_an_empty_tile() -> None:
    sheet = contact_sheet("t", "s", [Section("a", "b", ["c"], {"base": [Cell(None, None)]})])
    assert (0xEA, 0xEE, 0xF2) in colours(sheet)
