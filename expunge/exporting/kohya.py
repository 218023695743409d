"""A LoRA as kohya-ss sd-scripts writes it, which A1111, Forge, ComfyUI and model sites read."""

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from expunge import adapters, backbones
from expunge.errors import UserError
from expunge.exporting.deltas import Layers, uniform
from expunge.exporting.readback import digest

# The parts of a residual block and the embeddings, as the original UNet of Stable Diffusion numbers
# them; sd-scripts names SDXL's layers so, and those of SD 1.x and 2.x as diffusers does.
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_NAME = re.compile(
    r"(?P<way>down|up)_blocks\.(?P<block>\d+)\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)"
)


@dataclass(frozen=True)
class Family:
    """What readers call a kind of model.

    Attributes:
        version: `ss_base_model_version`.
        architecture: `modelspec.architecture`, without `/lora`.
        implementation: `modelspec.implementation`.
        original_names: Whether layers are named after the original UNet.
    """

    version: str
    architecture: str
    implementation: str = "diffusers"
    original_names: bool = False


SD1 = Family("sd_v1", "stable-diffusion-v1")
SD2 = Family("sd_v2", "stable-diffusion-v2-512")
SD2_V = Family("sd_v2_v", "stable-diffusion-v2-768-v")
SDXL = Family(
    "sdxl_base_v1-0",
    "stable-diffusion-xl-v1-base",
    "https://github.com/Stability-AI/generative-models",
    original_names=True,
)


def family_of(pipeline: Any) -> Family:
    """The kind of model, from its configuration."""
    family = backbones.family_of(pipeline)
    if family == "sd2" and pipeline.scheduler.config.prediction_type == "v_prediction":
        return SD2_V
    return {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}[family]


def original_name(name: str, unet_config: Any) -> str:
    """The name that a layer of diffusers' UNet has in the original one.

    With L layers to a block, `input_blocks` counts conv_in, then L blocks and a downsampler each
    time; `output_blocks` counts L + 1 blocks each time, an upsampler being the last part of the
    last one.

    Raises:
        UserError: The original UNet has no such layer.
    """
    if name in _OUTER:
        return _OUTER[name]
    layers = unet_config.layers_per_block
    if name.startswith("mid_block."):
        _, kind, number, rest = name.split(".", 3)
        if (middle := _MIDDLE.get(f"{kind}.{number}")) is not None:
            return f"middle_block.{middle}.{_inner(kind, rest)}"
    found = _NAME.fullmatch(name)
    if found is None or not isinstance(layers, int):
        raise UserError(
            f"got layer {name}, which Kohya's names for SDXL do not know; allowed: the layers of "
            "SDXL's UNet; say --to diffusers"
        )
    kind, block, index = found["kind"], int(found["block"]), int(found["index"])
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
    if kind == "upsamplers":
        # Behind the residual block and, where there is one, the attention.
        part = 2 if "Attn" in unet_config.up_block_types[block] else 1
        return f"output_blocks.{block * (layers + 1) + layers}.{part}.conv"
    place = block * (layers + 1) + index
    outer = f"input_blocks.{place + 1}" if found["way"] == "down" else f"output_blocks.{place}"
    return f"{outer}.{int(kind == 'attentions')}.{_inner(kind, found['rest'])}"


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest


def write(
    layers: Layers,
    pipeline: Any,
    folder: Path,
    name: str,
    dtype: torch.dtype,
    about: dict[str, Any],
) -> dict[str, str]:
    """Write `name.safetensors` with exact alphas and the metadata that user interfaces read.

    Args:
        layers: What the LoRA changes.
        pipeline: The model that it is for.
        folder: Where to.
        name: Of the file; prompts call the LoRA by it (`<lora:name:1>`).
        dtype: Of the weights; the alphas are float32.
        about: What the LoRA says of itself.

    Returns:
        The file's name and the digest of the tensors that it should hold.
    """
    layers, family = uniform(layers), family_of(pipeline)
    tensors: dict[str, Tensor] = {}
    for layer, delta in layers.items():
        path = original_name(layer, pipeline.unet.config) if family.original_names else layer
        key = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = delta.A.to(dtype).contiguous()
        tensors[f"{key}.lora_up.weight"] = delta.B.to(dtype).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(delta.alpha, dtype=torch.float32)
    header = metadata(layers, family, _resolution(pipeline), tensors, name, about)
    adapters.write(tensors, folder / f"{name}.safetensors", header)
    return {f"{name}.safetensors": digest(tensors)}


def metadata(
    layers: Layers,
    family: Family,
    resolution: str,
    tensors: dict[str, Tensor],
    name: str,
    about: dict[str, Any],
) -> dict[str, str]:
    """`ss_*` as sd-scripts writes it, Stability's `modelspec.*` 1.0.1, and what expunge knows."""
    one = next(iter(layers.values()))
    concept, objective = about["concept"]["name"], about["objective"]
    said = f"Removes {concept!r} from {about['model']}; trained with expunge ({objective})."
    digest_of_data = _sha256_of_data(tensors)
    found = {
        "format": "pt",
        "ss_base_model_version": family.version,
        "ss_v2": str(family in (SD2, SD2_V)),
        "ss_sd_model_name": about["model"],
        "ss_output_name": name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(one.rank),
        "ss_network_alpha": str(one.alpha),
        "ss_training_comment": said,
        "sshs_model_hash": digest_of_data,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.architecture}/lora",
        "modelspec.implementation": family.implementation,
        "modelspec.title": name,
        "modelspec.resolution": resolution,
        "modelspec.description": said,
        "modelspec.date": datetime.now(timezone.utc).replace(tzinfo=None).isoformat("T", "seconds"),
        "modelspec.hash_sha256": f"0x{digest_of_data}",
        "modelspec.prediction_type": "v" if family is SD2_V else "epsilon",
        "modelspec.tags": "concept-erasure, expunge",
        "modelspec.usage_hint": "Strength 1, no trigger word; any other strength was not measured.",
        adapters.METADATA: json.dumps(about, sort_keys=True),
    }
    if any(delta.A.ndim == 4 and delta.A.shape[-1] > 1 for delta in layers.values()):
        convolutions = {"conv_dim": str(one.rank), "conv_alpha": str(one.alpha)}
        found["ss_network_args"] = json.dumps(convolutions)
    found |= {f"ss_{key}": str(about[key]) for key in ("seed", "steps") if key in about}
    return found


def _resolution(pipeline: Any) -> str:
    _, height, width = backbones.latent_shape(pipeline)
    return f"{width * pipeline.vae_scale_factor}x{height * pipeline.vae_scale_factor}"


def _sha256_of_data(tensors: dict[str, Tensor]) -> str:
    """Of a safetensors file's bytes behind its header, which the metadata does not change."""
    data = save(tensors)
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
