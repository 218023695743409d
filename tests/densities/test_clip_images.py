"""A concept in pictures."""

from pathlib import Path

import pytest
import torch

from expunge.clip import load_clip
from expunge.concepts import Concept
from expunge.densities.clip_images import ClipImages, likeness_within
from expunge.errors import UserError


def test_mean_and_nearest_against_plain_sums(tiny_clip: str, folder_of, drawn) -> None:
    folder, images = folder_of("red", "red", 5), torch.cat([drawn("red", 2, 9), drawn("blue", 2)])
    guide = load_clip(tiny_clip)
    from expunge.pictures import picture_files, read_picture

    examples = guide.encode_images(torch.stack([read_picture(f) for f in picture_files(folder)]))
    seen = guide.encode_images(images)
    centre = sum(examples) / 5
    mean = seen @ (centre / centre.norm())
    built = ClipImages(folder, clip=tiny_clip, threshold=0.5).build()
    torch.testing.assert_close(built(images).score, mean, rtol=0, atol=1e-6)
    for k in (1, 3):
        table = (seen @ examples.T).tolist()
        nearest = torch.tensor([sum(sorted(row, reverse=True)[:k]) / k for row in table])
        config = ClipImages(folder, tiny_clip, "nearest", k, threshold=0.5)
        torch.testing.assert_close(config.build()(images).score, nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prototype", ["mean", "nearest"])
def test_it_tells_its_examples_kind_from_another(
    prototype, tiny_clip: str, folder_of, drawn
) -> None:
    density = ClipImages(folder_of("red", "red", 40), tiny_clip, prototype).build()
    red, blue = density(drawn("red", 20, 5)), density(drawn("blue", 20, 6))
    assert red.score.min() > blue.score.max()
    # The threshold that it found itself: what nine of ten examples reach.
    assert red.exceeds(density.thresholds).float().mean() > 0.6
    assert not blue.exceeds(density.thresholds).any()


@pytest.mark.parametrize("nearest", [None, 1, 2])
def test_the_threshold_leaves_each_example_out(nearest: int | None) -> None:
    vectors = torch.nn.functional.normalize(
        torch.randn(7, 4, generator=torch.manual_seed(0)) + 1, dim=1
    )
    scores = []
    for i in range(7):
        others = torch.cat([vectors[:i], vectors[i + 1 :]])
        if nearest is None:
            centre = others.mean(0)
            scores.append(vectors[i] @ centre / centre.norm())
        else:
            scores.append((others @ vectors[i]).topk(nearest).values.mean())
    expected = torch.stack(scores).quantile(0.1).item()
    assert likeness_within([vectors], nearest) == pytest.approx(expected, abs=1e-6)


def test_a_picture_of_any_size_and_kind_is_read(tiny_clip: str, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "notes.txt").write_text("not a picture")
    Image.new("RGBA", (70, 30), (255, 0, 0, 128)).save(tmp_path / "a.png")
    Image.new("L", (33, 64), 90).save(tmp_path / "b.jpg")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "grid.png")
    Image.new("P", (9, 9)).save(tmp_path / "c.gif")
    density = ClipImages(str(tmp_path), tiny_clip, name="odd").build()
    assert density.names == ["odd"]
    assert len(density.identity()["examples"]) == 3


def test_its_name(tiny_clip: str, folder_of) -> None:
    folder = folder_of("discs", "red", 1)
    config = ClipImages(folder, tiny_clip, threshold=0.5)
    assert config.build().names == ["discs"]
    assert config.build(Concept(name="bomb", targets=["a bomb"])).names == ["bomb"]


def test_a_broken_file_is_named_in_one_line(folder_of, tmp_path: Path) -> None:
    folder = Path(folder_of("red", "red", 3))
    whole = (folder / "001.png").read_bytes()
    for content in (b"", b"no picture", whole[: len(whole) // 2]):
        (folder / "001.png").write_bytes(content)
        with pytest.raises(UserError, match=r"got picture .*001\.png, which cannot be read") as e:
            ClipImages(str(folder)).build()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("settings", "n", "message"),
    [
        ({}, 2, "got 2 pictures in .*; allowed: 3 or more"),
        ({"prototype": "nearest", "nearest": 3}, 3, "allowed: 4 or more"),
        ({"prototype": "nearest", "nearest": 4, "threshold": 0.5}, 3, "allowed: 4 or more"),
        ({"nearest": 0}, 3, "got nearest 0"),
        ({"threshold": -1.1}, 3, "got threshold -1.1"),
        ({"clip": "emoij"}, 3, "unknown CLIP"),
    ],
)
def test_what_cannot_be_is_one_line(settings: dict, n: int, message: str, folder_of) -> None:
    with pytest.raises(ValueError, match=message):
        ClipImages(folder_of("red", "red", n), **settings).build()


def test_a_folder_must_be_there_and_hold_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which is no folder"):
        ClipImages(str(tmp_path / "none")).build()
    with pytest.raises(UserError, match="which holds no picture"):
        ClipImages(str(tmp_path)).build()
