"""LoRA adapters on a UNet: attach, switch off for the teacher, save exactly, load or fail.

The file is diffusers' own (`pytorch_lora_weights.safetensors`, keys `unet.<module>.lora_A.weight`)
with the alpha in its metadata: without it diffusers reads alpha = rank, silently.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge.errors import UserError

FILE = "pytorch_lora_weights.safetensors"
NAME = "erase"
METADATA = "expunge"  # our one key in the file's header; diffusers' is lora_adapter_metadata


def attach(unet: Any, modules: list[str], rank: int, alpha: float, seed: int) -> list[nn.Parameter]:
    """Put a LoRA on the named layers, ΔW = (alpha / rank) B A with B = 0, and return its weights.

    Everything else is frozen; the LoRA is float32 whatever the base is (arXiv 2106.09685).
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet.requires_grad_(False)
    # The initial A must not depend on what was drawn before.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)
        unet.add_adapter(config, adapter_name=NAME)
    cast_training_params(unet, torch.float32)
    return [p for p in unet.parameters() if p.requires_grad]


@contextmanager
def teacher(unet: Any) -> Iterator[None]:
    """The frozen base: the same network with its adapters off.

    Leave it before the student's forward: toggling between a forward and its backward breaks
    gradient checkpointing.
    """
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def weights(unet: Any, adapter: str = NAME) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, on the CPU."""
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(unet, adapter_name=adapter)
    return {k: v.detach().cpu().contiguous() for k, v in state.items()}


def save(pipeline: Any, folder: Path, metadata: dict[str, Any]) -> Path:
    """Write the adapter, load it back into the same UNet and compare, then give it its name.

    Args:
        pipeline: Whose UNet carries the adapter.
        folder: Where `pytorch_lora_weights.safetensors` appears.
        metadata: What the file says of itself (concept, objective …), as JSON.

    Raises:
        RuntimeError: What was read back is not what was written.
    """
    unet = pipeline.unet
    tensors = weights(unet)
    if not any(v.any() for k, v in tensors.items() if "lora_B" in k):
        raise RuntimeError("the adapter is all zero: nothing was trained")
    if not all(torch.isfinite(v).all() for v in tensors.values()):
        raise RuntimeError("the adapter holds NaN or infinite weights; lower the learning rate")
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in unet.peft_config[NAME].to_dict().items()
    }
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()}),
        METADATA: json.dumps(metadata, sort_keys=True),
    }
    temporary = folder / f".{os.getpid()}.{FILE}"
    save_file({f"unet.{k}": v for k, v in tensors.items()}, temporary, metadata=header)
    with _quiet():
        _compare(pipeline, temporary, tensors)
    temporary.replace(folder / FILE)
    return folder / FILE


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries warn of a second adapter, and log what is checked or raised here anyway."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.set_verbosity(level)


def _compare(pipeline: Any, file: Path, tensors: dict[str, Tensor]) -> None:
    unet, copy = pipeline.unet, "read_back"
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=copy)
    try:
        read = weights(unet, copy)
        if read.keys() != tensors.keys() or any(
            not torch.equal(read[k], v.to(read[k].dtype)) for k, v in tensors.items()
        ):
            raise RuntimeError("the LoRA that was read back differs from the one written")
        for module in unet.modules():
            scaling = getattr(module, "scaling", {})
            if NAME in scaling and scaling[NAME] != scaling.get(copy):
                raise RuntimeError("the LoRA that was read back has another alpha")
    finally:
        pipeline.delete_adapters(copy)
        unet.set_adapter(NAME)


def locate(lora: str | Path) -> Path:
    """The LoRA file that a folder or a file name means.

    Raises:
        UserError: It is missing, or not a safetensors file.
    """
    path = Path(lora)
    file = path / FILE if path.is_dir() else path
    if file.suffix != ".safetensors" and file.exists():
        raise UserError(
            f"got weights {lora}; allowed: safetensors files, since a pickle can run code; "
            "convert it where you trust it"
        )
    if not file.is_file():
        raise UserError(f"got LoRA {lora}, but {file} does not exist; allowed: a folder or a file")
    return file


def read_header(lora: str | Path) -> dict[str, str]:
    """The metadata strings of a LoRA file.

    Raises:
        UserError: The file is missing or not readable as safetensors.
    """
    file = locate(lora)
    try:
        with safe_open(file, "pt") as stream:
            return stream.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"got LoRA {file}, which is no readable safetensors file ({error})"
        ) from error


def read_metadata(lora: str | Path) -> dict[str, Any]:
    """What expunge wrote about a LoRA: concept, objective …; empty for a file of others."""
    text = read_header(lora).get(METADATA)
    return json.loads(text) if text else {}


def load(pipeline: Any, loras: list[str], scale: float = 1.0) -> list[str]:
    """Load LoRA files into a pipeline and prove that every one of them is active.

    diffusers only warns, or says nothing, when a file matches no module; for an adapter that
    removes a concept this would fail open.

    Returns:
        The adapters' names, one a file.

    Raises:
        UserError: A file is broken, fits no module of this model, or does nothing.
    """
    names = []
    for index, lora in enumerate(loras):
        file, name = locate(lora), f"{NAME}_{index}"
        read_header(file)
        keys = set(load_file(file))
        try:
            with _quiet():
                pipeline.load_lora_weights(
                    str(file.parent), weight_name=file.name, adapter_name=name
                )
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise UserError(
                f"got LoRA {file}, which does not fit this model "
                f"({' '.join(str(error).split())[:200]}); allowed: a LoRA made for this model"
            ) from error
        loaded = [weights(c, name) for c in _networks(pipeline) if name in c.peft_config]
        count = sum(map(len, loaded))
        tensors = sum(1 for key in keys if not key.endswith(".alpha"))
        if count == 0 or count != tensors:
            raise UserError(
                f"got LoRA {file}: {count} of its {tensors} tensors match a module of this model; "
                "allowed: a LoRA of which all do; it would not erase anything"
            )
        if not all(torch.isfinite(v).all() for part in loaded for v in part.values()):
            raise UserError(f"got LoRA {file}, which holds NaN or infinite weights; train it anew")
        if not any(v.any() for part in loaded for k, v in part.items() if "lora_B" in k):
            raise UserError(f"got LoRA {file}, whose weights are all zero: it erases nothing")
        names.append(name)
    if names:
        pipeline.set_adapters(names, [scale] * len(names))
        if set(pipeline.get_active_adapters()) != set(names):
            raise RuntimeError("the adapters were loaded but are not active")
    return names


def _networks(pipeline: Any) -> list[Any]:
    networks = (getattr(pipeline, part, None) for part in ("unet", "text_encoder"))
    return [n for n in networks if getattr(n, "peft_config", None)]
