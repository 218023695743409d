"""Pictures for the densities: coloured discs, which even a random network tells apart."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expunge.pictures import save_png, to_pil

COLOURS = {"red": (1.0, -1.0, -1.0), "blue": (-1.0, -1.0, 1.0), "grey": (0.0, 0.0, 0.0)}


def discs(colour: str, n: int, seed: int = 0, size: int = 32) -> Tensor:
    """(n, 3, size, size): a disc of the colour somewhere on a light, noisy ground."""
    generator = torch.Generator().manual_seed(seed)
    centre = size * (0.3 + 0.4 * torch.rand(n, 2, 1, 1, generator=generator))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < (size / 4) ** 2
    ground = 0.5 + 0.1 * torch.randn(n, 3, size, size, generator=generator)
    ink = torch.tensor(COLOURS[colour]).view(1, 3, 1, 1)
    return torch.where(inside[:, None], ink, ground).clamp(-1, 1)


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Tensor]:
    return discs


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., str]:
    """Write discs of a colour as PNG files into a folder below the test's own."""

    def write(name: str, colour: str, n: int, seed: int = 0) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for index, picture in enumerate(discs(colour, n, seed)):
            save_png(to_pil(picture), folder / f"{index:03d}.png")
        return str(folder)

    return write
