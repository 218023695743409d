import numpy as np
import pytest
import torch
from PIL import Image

from expunge import pictures
from expunge.errors import UserError


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


def test_a_picture_file_is_read_as_it_was_written(tmp_path) -> None:
    levels = torch.arange(3 * 5 * 7).view(3, 5, 7).float() / 52 - 1
    pictures.save_png(pictures.to_pil(levels), tmp_path / "a.png")
    again = pictures.read_picture(tmp_path / "a.png")
    assert again.shape == (3, 5, 7)
    torch.testing.assert_close(again, levels.clamp(-1, 1), rtol=0, atol=1 / 255 + 1e-6)


def test_transparent_is_white_and_a_camera_held_upright(tmp_path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (pictures.read_picture(tmp_path / "clear.png") == 1).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert pictures.read_picture(tmp_path / "turned.jpg").shape == (3, 8, 4)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, suffix) -> None:
    levels = np.array([[0, 128 * 257, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
    found = pictures.read_picture(tmp_path / f"deep.{suffix}")
    wanted = torch.tensor([0.0, 128.0, 255.0]) / 127.5 - 1
    torch.testing.assert_close(found, wanted.expand(3, 1, 3))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_known_white_are_refused(tmp_path, dtype) -> None:
    Image.fromarray(np.full((2, 2), 7, dtype)).save(tmp_path / "odd.tif")
    with pytest.raises(UserError, match=r"odd\.tif of mode [IF], .*allowed: 8 or 16 bits"):
        pictures.read_picture(tmp_path / "odd.tif")


def test_the_pictures_of_a_folder(tmp_path) -> None:
    for name in ("b.png", "a.JPG", "grid.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in pictures.picture_files(tmp_path)] == ["a.JPG", "b.png"]
    with pytest.raises(UserError, match=r"a\.JPG, which cannot be read"):
        pictures.read_picture(tmp_path / "a.JPG")
    with pytest.raises(UserError, match="no folder"):
        pictures.picture_files(tmp_path / "a.JPG")
