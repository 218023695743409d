"""Pictures as latents: what a decoder reads of them, and pictures of another size."""

import pytest
import torch

from expunge import backbones
from expunge.decoding.autoencoders import from_pipeline
from expunge.encoding import to_latents

SHAPE = (4, 8, 8)


@pytest.mark.parametrize(
    "scale",
    [{}, {"shift_factor": 0.3}, {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0] * 4}],
)
def test_a_picture_comes_back_as_decoders_read_latents(tiny_sd1, scale) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    pipeline.vae.register_to_config(**scale)
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z = pipeline.vae.encode(pictures).latent_dist.mode()
        expected = pipeline.vae.decode(z).sample
        decoded = from_pipeline(pipeline)(to_latents(pipeline.vae, SHAPE, pictures))
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-4)


def test_pictures_of_another_size_cover_and_are_cut(tiny_sd1) -> None:
    vae = backbones.load_pipeline(tiny_sd1).vae
    small = torch.rand(3, 16, 16) * 2 - 1
    wide = torch.nn.functional.pad(small, (8, 8))
    grey = [torch.full((3, *size), 0.25) for size in ((40, 24), (16, 16))]
    a, b, c, d = to_latents(vae, SHAPE, [wide, small, *grey])
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(c, d)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_a_vae_encodes_in_float32(dtype, tiny_sd1) -> None:
    """As SDXL's does, its activations pass what float16 holds; its weights do not."""
    vae = backbones.load_pipeline(tiny_sd1).vae
    with torch.no_grad():
        vae.encoder.conv_in.weight *= 1e5
    reduced = vae.to(dtype)
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    found = to_latents(reduced, SHAPE, pictures)
    assert {p.dtype for p in reduced.parameters()} == {dtype}
    assert torch.equal(found, to_latents(reduced.float(), SHAPE, pictures))


def test_latents_that_are_no_numbers_are_an_error(tiny_sd1) -> None:
    vae = backbones.load_pipeline(tiny_sd1).vae
    with torch.no_grad():
        vae.encoder.conv_in.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="the VAE made latents of NaN"):
        to_latents(vae, SHAPE, torch.zeros(1, 3, 16, 16))
