import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from expunge.errors import UserError
from expunge.eval.store import ImageStore, Pixels

IDENTITY = {"weights": "abc", "steps": 25}


def picture(seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (8, 6, 3), dtype=np.uint8)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    key = store.key(IDENTITY, "a bömb", 3)
    assert store.read(key) is None
    store.write(key, picture(0), "a bömb", 3)
    np.testing.assert_array_equal(store.read(key), picture(0))
    with Image.open(store.path(key)) as image:
        assert image.text["prompt"] == "a bömb"
        assert image.text["seed"] == "3"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"{key}.png"]
    assert store.notes == []


def test_the_key_depends_on_everything_and_on_no_order(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    keys = {
        store.key(identity, prompt, seed)
        for identity in (IDENTITY, IDENTITY | {"steps": 26}, IDENTITY | {"dtype": "float16"})
        for prompt in ("a bomb", "a bomb ")
        for seed in (0, 1)
    }
    assert len(keys) == 12
    assert store.key({"steps": 25, "weights": "abc"}, "x", 0) == store.key(IDENTITY, "x", 0)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "text"])
def test_a_damaged_picture_is_found(tmp_path: Path, damage: str) -> None:
    store = ImageStore(tmp_path)
    key = store.key(IDENTITY, "a bomb", 0)
    store.write(key, picture(0), "a bomb", 0)
    path = store.path(key)
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        at = whole.index(b"IDAT") + 40
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        Image.fromarray(picture(1)).save(path)
    else:
        path.write_text("no picture")
    assert store.read(key) is None
    assert len(store.notes) == 1
    assert key in store.notes[0]
    store.write(key, picture(0), "a bomb", 0)
    np.testing.assert_array_equal(store.read(key), picture(0))


def test_an_interrupted_write_leaves_the_earlier_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ImageStore(tmp_path)
    key = store.key(IDENTITY, "a bomb", 0)

    def stop(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        store.write(key, picture(0), "a bomb", 0)
    assert store.read(key) is None
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_disk_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = ImageStore(tmp_path / "file")
    with pytest.raises(UserError, match="image store"):
        store.write("ab", picture(0), "a bomb", 0)
    with pytest.raises(UserError, match="image store"):
        store.describe(IDENTITY)
