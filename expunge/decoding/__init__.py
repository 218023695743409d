"""From the latents that a scheduler sees to the pictures that a density sees."""

from expunge.decoding.settings import Auto, Clip, DecoderConfig, Linear, Tiny, Vae
from expunge.registry import Entry, Registry

__all__ = ["DECODERS", "Auto", "Clip", "DecoderConfig", "Linear", "Tiny", "Vae"]

DECODERS = Registry(
    "decoder",
    {
        "auto": Entry(
            "expunge.decoding.settings:Auto", "clip where the model has one, else its VAE"
        ),
        "vae": Entry("expunge.decoding.settings:Vae", "the model's own VAE: exact"),
        "tiny": Entry(
            "expunge.decoding.settings:Tiny", "a small public autoencoder (TAESD): full size"
        ),
        "clip": Entry(
            "expunge.decoding.settings:Clip",
            "only the pixels that CLIP needs, distilled from the VAE (expunge distill-decoder)",
        ),
        "linear": Entry(
            "expunge.decoding.settings:Linear",
            "one colour for each latent, by least squares (expunge distill-decoder)",
        ),
    },
)
