import numpy as np
from PIL import Image, ImageFont

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


def test_whatever_the_captions_need_every_picture_is_there() -> None:
    words = "a very detailed oil painting of a bomb, trending, 4k, " * 12
    for prompt in (words, words.replace(" ", "")):
        cells = [Cell(np.full((64, 64, 3), (10, 20, 30), np.uint8), True)] * 3
        part = Section("title", "note", [prompt] * 3, {"base": cells, "erased": cells})
        pixels = np.array(contact_sheet("title", "text", [part] * 5))
        assert (pixels == (10, 20, 30)).all(2).sum() == 5 * 6 * TILE * TILE
        assert (pixels[-10:] == 255).all()
        font = ImageFont.load_default(12)
        for lines in part.lines:
            assert len(lines) == 8
            assert lines[-1].endswith("…")
            assert all(font.getlength(line) <= TILE for line in lines)


def test_what_nobody_asked_about_has_no_frame() -> None:
    pixels = np.full((64, 64, 3), (10, 20, 30), np.uint8)
    part = Section("a", "b", ["c"], {"base": [Cell(pixels, None, asked=False)]})
    found = colours(contact_sheet("t", "s", [part]))
    assert (10, 20, 30) in found
    assert not found & {(0x2D, 0xA4, 0x4E), (0xCF, 0x22, 0x2E), (0x8C, 0x95, 0x9F)}


def test_a_blurred_picture_shows_no_line() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[4::8] = (0, 0, 255)

    def blue(blurred: bool) -> int:
        cell = Cell(pixels, False, blurred=blurred)
        sheet = contact_sheet("t", "s", [Section("a", "b", ["c"], {"base": [cell]})])
        tile = np.array(sheet).astype(int)[..., 2][(np.array(sheet)[..., :2] == 0).all(2)]
        return int(tile.max() - tile.min())

    assert blue(False) == 255
    assert blue(True) < 40


def test_a_missing_picture_is_an_empty_tile() -> None:
    sheet = contact_sheet("t", "s", [Section("a", "b", ["c"], {"base": [Cell(None, None)]})])
    assert (0xEA, 0xEE, 0xF2) in colours(sheet)
