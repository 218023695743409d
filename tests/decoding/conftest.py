"""A tiny model with a decoder distilled by the command, and a tiny public autoencoder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expunge.decoding.command import main

QUICK = ["--images", "6", "--held_out", "3", "--stages", "2", "--sampling_steps", "3"]
QUICK += ["--width", "16", "--depth", "1", "--batch_size", "4", "--steps", "30"]


@pytest.fixture(scope="session")
def distil(tiny_sd1) -> Callable[..., Path]:
    """Run `expunge distill-decoder` on the tiny model."""

    def run(folder: Path, *more: str) -> Path:
        main(["--model", tiny_sd1, "--output_dir", str(folder), "--device", "cpu", *QUICK, *more])
        return folder

    return run


@pytest.fixture(scope="session")
def distilled(distil, tmp_path_factory) -> Path:
    """What the command leaves."""
    return distil(tmp_path_factory.mktemp("distilled") / "out")


@pytest.fixture(scope="session")
def taesd(tmp_path_factory) -> Path:
    """A random AutoencoderTiny for latents of four channels."""
    return _save_taesd(tmp_path_factory.mktemp("taesd"), channels=4)


@pytest.fixture
def taesd16(tmp_path) -> Path:
    """One for latents of sixteen channels, as SD 3 has."""
    return _save_taesd(tmp_path / "taesd16", channels=16)


def _save_taesd(folder: Path, channels: int) -> Path:
    from diffusers import AutoencoderTiny

    torch.manual_seed(1)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=channels,
    ).save_pretrained(folder)
    return folder
