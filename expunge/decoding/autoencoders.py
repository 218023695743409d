"""Decoders that are autoencoders: the pipeline's own, and small public ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from expunge.decoding.base import ENCODING_PARTS, Decoder, latent_channels, vae_factor
from expunge.errors import UserError

# scaling_factor of the VAE -> the TAESD made for its latents
# (https://github.com/madebyollin/taesd).
TINY = {0.18215: "madebyollin/taesd", 0.13025: "madebyollin/taesdxl"}


def from_pipeline(pipeline: Any) -> Decoder:
    """The pipeline's own VAE.

    It shares the weights of a float32 VAE and copies half precision ones, so that the pipeline's
    own is never moved, cast or trained: SDXL's overflows in float16.

    Raises:
        UserError: The weights are not there, as under sequential offload.
    """
    return Decoder(_Autoencoder(pipeline.vae), latent_channels(pipeline), vae_factor(pipeline.vae))


def tiny(path: str | None, pipeline: Any) -> Decoder:
    """An AutoencoderTiny for latents of this pipeline; None is the TAESD of its family.

    Raises:
        UserError: It cannot be loaded, lacks weights, or is for other latents.
    """
    path = path or _family(pipeline.vae)
    vae = _load_tiny(path)
    channels = latent_channels(pipeline)
    if vae.config.latent_channels != channels:
        raise UserError(
            f"got tiny decoder {path}, for latents of {vae.config.latent_channels} channels; "
            f"allowed: {channels}, as in this model; choose the one of its family"
        )
    return Decoder(_Autoencoder(vae), channels, vae_factor(vae))


class _Autoencoder(nn.Module):
    """The decoding half of a diffusers autoencoder, with the scale of its latents."""

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        vae = getattr(vae, "_orig_mod", vae)  # torch.compile's wrapper
        self.twin: Any = _decoding_half(vae)
        self.scale = float(vae.config.scaling_factor)
        self.shift = vae.config.get("shift_factor")
        # Some SDXL models centre each channel as well.
        self.centred = vae.config.get("latents_mean") is not None
        if self.centred:
            for name in ("latents_mean", "latents_std"):
                self.register_buffer(name, torch.tensor(vae.config[name]).view(1, -1, 1, 1))

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) as the scheduler sees them -> (B, 3, H, W)."""
        if self.centred:
            z = latents * self.latents_std / self.scale + self.latents_mean
        else:
            z = latents / self.scale
        if self.shift:
            z = z + self.shift
        pictures: Tensor = self.twin.decode(z, return_dict=False)[0]
        return pictures


def _decoding_half(vae: Any) -> Any:
    """A frozen float32 twin without encoder or hooks, on the memory of a VAE that is float32."""
    state = {
        key: value.detach().float()
        for key, value in vae.state_dict().items()
        if key.partition(".")[0] not in ENCODING_PARTS
    }
    if any(value.is_meta for value in state.values()):
        raise UserError(
            "got a pipeline whose VAE is offloaded layer by layer; allowed: weights in memory; "
            "use enable_model_cpu_offload, or build the decoder before offloading"
        )
    with torch.device("meta"):
        twin = type(vae).from_config(vae.config)
    for part in ENCODING_PARTS:
        if getattr(twin, part, None) is not None:
            setattr(twin, part, nn.Identity())
    twin.load_state_dict(state, assign=True)
    # Slices and tiles are part of how the pipeline decodes.
    for name, value in vars(vae).items():
        if name.startswith(("use_", "tile_")):
            setattr(twin, name, value)
    return twin


def _load_tiny(path: str) -> Any:
    from diffusers import AutoencoderTiny

    try:
        if AutoencoderTiny.load_config(path).get("_class_name") != "AutoencoderTiny":
            raise ValueError("it is another class of model")
        # Missing weights are only logged by diffusers, and would be random.
        vae, report = AutoencoderTiny.from_pretrained(
            path, use_safetensors=True, output_loading_info=True
        )
        if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:
            raise ValueError(f"it lacks {len(wrong)} weights, {wrong[0]} first")
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise UserError(
            f"got tiny decoder {path}, which cannot be loaded ({reason}); allowed: the folder or "
            "hub id of a diffusers AutoencoderTiny with safetensors weights"
        ) from error
    return vae


def _family(vae: Any) -> str:
    scale = float(vae.config.scaling_factor)
    for known, name in TINY.items():
        if abs(scale - known) < 1e-6:
            return name
    raise UserError(
        f"got no path of a tiny decoder, and there is none for latents scaled by {scale:g}; "
        "allowed: a folder or hub id of an AutoencoderTiny; set its path, or use the vae decoder"
    )
