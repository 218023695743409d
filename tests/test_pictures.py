import pytest
import torch
from PIL import Image

from expunge import pictures


def test_levels_round_to_the_nearest() -> None:
    level = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 3).expand(3, 2, 3)
    image = pictures.to_pil(level)
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    assert pictures.to_pil(level * 9).getpixel((2, 1)) == (255, 255, 255)


def test_a_sheet_shows_every_picture(tmp_path) -> None:
    colours = ["red", "lime", "blue"]
    tiles = [Image.new("RGB", (64, 64), colour) for colour in colours]
    sheet = pictures.sheet([tiles, tiles[:1]], ["first", "second"])
    found = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= found
    pictures.save_png(sheet, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == sheet.size
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


def test_rows_and_labels_belong_together() -> None:
    with pytest.raises(ValueError, match="1 rows and 2 labels"):
        pictures.sheet([[Image.new("RGB", (8, 8))]], ["a", "b"])
