"""Pictures that even a random network tells apart, sorted in two."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expunge.pictures import save_png, to_pil


@pytest.fixture
def pictures_in() -> Callable[..., list[Path]]:
    """Write n pictures around a colour into a folder."""

    def write(folder: Path, colour: tuple[float, float, float], n: int) -> list[Path]:
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(n)
        files = []
        for index in range(n):
            noise = 0.1 * torch.randn(3, 20, 24, generator=generator)
            picture = torch.tensor(colour).view(3, 1, 1) + noise
            files.append(folder / f"{index}.png")
            save_png(to_pil(picture), files[-1])
        return files

    return write


@pytest.fixture
def labelled(pictures_in, tmp_path: Path) -> Path:
    """A folder sorted in two: 5 red, 6 blue."""
    pictures_in(tmp_path / "labelled" / "yes", (0.9, -0.9, -0.9), 5)
    pictures_in(tmp_path / "labelled" / "no", (-0.9, -0.9, 0.9), 6)
    return tmp_path / "labelled"
