import pytest
import torch

from expunge import backbones
from expunge.generation import generate, pictures_at_once

PROMPTS = ["a bomb", "a key", "a cat face", "a bus", "a bomb"]
SEEDS = [3, 1, 4, 1, 5]


def draw(pipeline, prompts, seeds, batch_size: int = 16) -> torch.Tensor:
    return generate(pipeline, prompts, seeds, steps=3, guidance_scale=4.0, batch_size=batch_size)


def test_a_picture_depends_on_its_prompt_and_seed_alone(tiny_sd1) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    together = draw(pipeline, PROMPTS, SEEDS)
    assert together.shape == (5, 3, 16, 16)
    for batch_size in (1, 2, 3):
        assert (draw(pipeline, PROMPTS, SEEDS, batch_size) - together).abs().max() < 1e-4
    backwards = draw(pipeline, PROMPTS[::-1], SEEDS[::-1])
    assert (backwards.flip(0) - together).abs().max() < 1e-4
    torch.manual_seed(123)
    assert torch.equal(draw(pipeline, PROMPTS, SEEDS), together)
    # The same prompt from another seed is another picture.
    assert (together[0] - together[4]).abs().max() > 1e-2


def test_pictures_lie_in_their_range(tiny_sd1) -> None:
    pictures = draw(backbones.load_pipeline(tiny_sd1), PROMPTS, SEEDS)
    assert pictures.min() >= -1
    assert pictures.max() <= 1


def test_nan_is_an_error_and_not_a_black_picture(tiny_sd1) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    pipeline.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        draw(pipeline, ["a bomb"], [0])


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinities_are_an_error_and_not_a_white_picture(tiny_sd1, value) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    pipeline.vae.decoder.conv_out.bias.data.fill_(value)
    with pytest.raises(FloatingPointError, match="infinite"):
        draw(pipeline, ["a bomb"], [0])
    assert not pipeline.vae.decoder._forward_hooks


def test_how_many_at_once_follows_from_their_size(tiny_sd1) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    counts = {}
    for side in (8, 64, 96, 128, (128, 128), 512):
        pipeline.unet.register_to_config(sample_size=side)
        counts[side] = pictures_at_once(pipeline)
    assert counts[8] == counts[64] == 16
    assert counts[512] == 8 * 512 * 512 // (512 * pipeline.vae_scale_factor) ** 2
    assert counts[128] == counts[128, 128]
