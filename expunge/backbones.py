"""Load a pipeline by name, folder or hub id, and say which of its modules belong to which group."""

import sys
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge.errors import UserError, nearest
from expunge.results import sha256_folder
from expunge.silence import quiet

BUNDLED = ("emoji",)
GUIDANCE_SCALE = {"emoji": 4.0}
MODULE_GROUPS = {
    "x": "cross-attention: attn2 q, k, v, out",
    "x-strict": "cross-attention: attn2 k, v",
    "u": "all linear layers and convolutions but attn2, the outer embeddings and conv_out",
    "all": "all linear layers and convolutions but the outer embeddings and conv_out",
}


def bundled(name: str) -> Path:
    """The folder of a model that is shipped with expunge."""
    return Path(str(resources.files("expunge.models"))) / name


def resolve(model: str) -> str:
    """A folder with a pipeline in it, or the hub id unchanged.

    Raises:
        UserError: Neither a bundled model, nor a pipeline's folder, nor of the form owner/name.
    """
    if model in BUNDLED:
        return str(bundled(model))
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"got model folder {model}, which holds no model_index.json; allowed: a folder "
                "saved by diffusers' save_pretrained; convert the checkpoint first"
            )
        return str(folder)
    parts = model.split("/")
    if len(parts) == 2 and all(parts) and not model.startswith((".", "~")):
        return model
    hint = f"; did you mean {close}?" if (close := nearest(model, BUNDLED)) else ""
    raise UserError(
        f"got model {model!r}, which is no folder; allowed: {', '.join(BUNDLED)}, a diffusers "
        f"folder, or a hub id owner/name{hint}"
    )


def identity(model: str) -> str:
    """What tells a loaded model from others of its name: SHA-256 of its folder, or its hub commit.

    What lies in the hub's cache beside the files that were loaded is no part of it.

    Raises:
        RuntimeError: The cache does not say of which commit the model is.
    """
    where = resolve(model)
    if Path(where).is_dir():
        return sha256_folder(where)
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(where, "model_index.json")  # …/snapshots/COMMIT/model_index.json
    if not isinstance(file, str):
        raise RuntimeError(f"the hub's cache does not say of which commit {model} is")
    return Path(file).parent.name


def load_pipeline(
    model: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    quantisation: Any = None,
) -> Any:
    """The text-to-image pipeline of a model, from safetensors files only.

    Args:
        model: `emoji`, a folder, a hub id.
        dtype: Of the weights.
        device: Where they are.
        quantisation: A `PipelineQuantizationConfig` of diffusers; what it leaves out has `dtype`.

    Raises:
        UserError: The model is missing, broken, offers only pickles, or is of another family.
    """
    import diffusers
    import transformers
    from diffusers import (
        DiffusionPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )
    from safetensors import SafetensorError

    where = resolve(model)
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    # A quantised network can be told its precision only while it is loaded.
    reduced = {"quantization_config": quantisation, "torch_dtype": dtype} if quantisation else {}
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            where,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **reduced,
        )
    except (
        OSError,
        SafetensorError,
        ValueError,
        TypeError,
        AttributeError,
        ImportError,
        RuntimeError,
        KeyError,
    ) as error:
        raise UserError(
            f"got model {model}, which cannot be loaded ({_first_line(error)}); allowed: a whole "
            "diffusers model with safetensors weights; check the folder or the network"
        ) from error
    if not isinstance(pipeline, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise UserError(
            f"got model {model}, a {type(pipeline).__name__}; allowed: Stable Diffusion 1.x, 2.x "
            "or XL (its base, not its refiner)"
        )
    pipeline.set_progress_bar_config(disable=True)
    # Only where it is not so already: diffusers warns of every cast, and refuses a quantised one.
    dtypes = {getattr(part, "dtype", dtype) for part in pipeline.components.values()}
    cast = [] if quantisation or dtypes == {dtype} else [dtype]
    try:
        # At once: a GPU need not hold in float32 what it is to hold in half. diffusers warns
        # that a cast may be inconsistent, or is meant for a GPU.
        with quiet(diffusers.utils.logging):
            pipeline.to(device, *cast)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"got device {device!r}, which cannot be used ({_first_line(error)}); allowed: cpu, "
            "cuda, mps, as far as this machine has them"
        ) from error
    return pipeline


def family_of(pipeline: Any) -> Literal["sd1", "sd2", "sdxl"]:
    """Whose shape a model has: Stable Diffusion 1.x, 2.x or XL."""
    config = pipeline.unet.config
    if config.addition_embed_type == "text_time":
        return "sdxl"
    return "sd2" if config.use_linear_projection else "sd1"


def device_of(name: str) -> str:
    """The device that a name means: `auto` is the GPU if there is one, else the CPU."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def recommended_guidance(model: str) -> float:
    """The guidance scale that a model is usually sampled with."""
    return GUIDANCE_SCALE.get(model, 7.5)


def modules_of(unet: nn.Module, group: str) -> list[str]:
    """Names of the linear and convolution layers of a module group (`MODULE_GROUPS`).

    Raises:
        UserError: No such group, or it matches nothing in this network.
    """
    if group not in MODULE_GROUPS:
        raise UserError(f"got module group {group!r}; allowed: {', '.join(MODULE_GROUPS)}")
    names = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and _in_group(name, group)
    ]
    if not names:
        raise UserError(f"module group {group!r} matches no layer of this {type(unet).__name__}")
    return names


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: list[str]) -> Tensor:
    """Text embeddings (B, T, D) of the prompts, which cross-attention reads."""
    return encode(pipeline, prompts)[0]


def encode(pipeline: Any, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
    """Embeddings (B, T, D), and of SDXL the pooled ones (B, D'), as the pipeline makes them.

    Of SDXL's two encoders D is the sum of the widths.
    """
    found = pipeline.encode_prompt(
        prompts,
        device=pipeline.unet.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    return found[0], found[2] if len(found) > 2 else None


def latent_shape(pipeline: Any) -> tuple[int, int, int]:
    """(C, h, w) of the latents at the model's own picture size."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipeline.unet.config.in_channels, height, width


def _in_group(name: str, group: str) -> bool:
    cross = ".attn2." in name
    if group == "x":
        return cross
    if group == "x-strict":
        return cross and name.endswith((".to_k", ".to_v"))
    outer = name.startswith(("conv_out", "time_embedding", "add_embedding"))  # the last is SDXL's
    return not outer and (group == "all" or not cross)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
