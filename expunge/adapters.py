"""LoRA adapters on a UNet: attach, switch off for the teacher, save exactly, load or fail.

The file is diffusers' own (`pytorch_lora_weights.safetensors`, keys `unet.<module>.lora_A.weight`)
with the alpha in its metadata: without it diffusers reads alpha = rank, silently.
"""

import errno
import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
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


def attach(
    unet: Any, modules: list[str], rank: int, alpha: float, seed: int, fixed: Sequence[str] = ()
) -> list[nn.Parameter]:
    """Put a LoRA on the named layers, ΔW = (alpha / rank) B A with B = 0; its weights that learn.

    Everything else is frozen, and so is the LoRA on the `fixed` ones of these layers; it is float32
    whatever the base is (arXiv 2106.09685).
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
    for name in fixed:
        unet.get_submodule(name).requires_grad_(False)
    return [p for p in unet.parameters() if p.requires_grad]


@contextmanager
def teacher(unet: Any) -> Iterator[None]:
    """The frozen base: the same network with its adapters off.

    Leave it before the student's backward: gradient checkpointing runs the student's forward again
    there, which must find its adapters on.
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
        UserError: It learnt nothing.
        RuntimeError: What was read back is not what was written.
    """
    unet = pipeline.unet
    tensors = weights(unet)
    if not any(v.any() for k, v in tensors.items() if "lora_B" in k):
        raise UserError(
            "got an adapter that is all zero: it erases nothing; allowed: one that learnt; lower "
            "the threshold that nothing reached, or train longer"
        )
    if not all(torch.isfinite(v).all() for v in tensors.values()):
        raise RuntimeError("the adapter holds NaN or infinite weights; lower the learning rate")
    header = diffusers_header(unet.peft_config[NAME].to_dict(), metadata)
    temporary = folder / ".unfinished.safetensors"
    try:
        write({f"unet.{k}": v for k, v in tensors.items()}, temporary, header)
        with quiet():
            _compare(pipeline, temporary, tensors)
        temporary.replace(folder / FILE)
    finally:
        temporary.unlink(missing_ok=True)
    return folder / FILE


def diffusers_header(config: dict[str, Any], metadata: dict[str, Any]) -> dict[str, str]:
    """What diffusers and expunge read in the head of a LoRA file.

    Args:
        config: `r`, `lora_alpha` and `target_modules`; others of peft's settings do not count.
        metadata: What the file says of itself.
    """
    # Only what every version of peft knows: it refuses a key that it does not.
    known = {"peft_type": "LORA", "r": config["r"], "lora_alpha": config["lora_alpha"]}
    known |= {"bias": "none", "target_modules": sorted(config["target_modules"])}
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in known.items()}),
        METADATA: json.dumps(metadata, sort_keys=True),
    }


def save_tensors(tensors: dict[str, Tensor], file: Path, header: dict[str, str]) -> None:
    """`save_file`, but a full disk is an `OSError`, and others may read the file as any other."""
    try:
        save_file(tensors, file, metadata=header)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from error
        raise
    mask = os.umask(0)  # there is no other way to ask for it
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def write(tensors: dict[str, Tensor], file: Path, header: dict[str, str]) -> None:
    """Write a safetensors file with its metadata in one order: safetensors' own is random.

    Equal runs then leave equal bytes. A safetensors file is the header's length (8 bytes, little
    endian), the header (JSON, padded with blanks to a multiple of 8) and the tensors.
    """
    save_tensors(tensors, file, header)
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:end])
    head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@contextmanager
def quiet() -> Iterator[None]:
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
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"got LoRA {lora}, whose {METADATA!r} metadata is no JSON object")
    return found


def load(pipeline: Any, loras: list[str], scale: float = 1.0) -> list[str]:
    """Load LoRA files into a pipeline and prove that every one of them is active.

    diffusers only warns, or says nothing, when a file matches no module; for an adapter that
    removes a concept this would fail open.

    Returns:
        The adapters' names, one a file.

    Raises:
        UserError: A file is broken, fits no module of this model, or does nothing.
    """
    if loras and not 0 < scale < math.inf:
        raise UserError(f"got lora_scale {scale}; allowed: above 0; 1 is what was trained")
    names = []
    for index, lora in enumerate(loras):
        file, name = locate(lora), f"{NAME}_{index}"
        read_header(file)
        keys = set(load_file(file))
        try:
            with quiet():
                pipeline.load_lora_weights(
                    str(file.parent), weight_name=file.name, adapter_name=name
                )
        except (ValueError, TypeError, RuntimeError, KeyError, OSError) as error:
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
        for half in ("lora_A", "lora_B"):
            if not any(v.any() for part in loaded for k, v in part.items() if half in k):
                raise UserError(f"got LoRA {file}, whose {half} is all zero: it erases nothing")
        names.append(name)
    if names:
        pipeline.set_adapters(names, [scale] * len(names))
        _require_active(pipeline, names)
    return names


def _require_active(pipeline: Any, names: list[str]) -> None:
    """Every layer that has an adapter uses it; the pipeline's own list speaks of one layer only."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = set()
    for network in _networks(pipeline):
        for layer in network.modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            for name in set(names) & set(layer.lora_A):
                found.add(name)
                active = name in layer.active_adapters and not layer.disable_adapters
                if not active or not layer.scaling[name] > 0:
                    raise UserError(
                        f"got LoRA {name} with scaling {layer.scaling[name]}, which is not active "
                        "in every layer; allowed: an alpha above 0"
                    )
    if found != set(names):
        raise RuntimeError(f"the adapters {sorted(set(names) - found)} are in no layer")


def _networks(pipeline: Any) -> list[Any]:
    parts = ("unet", "text_encoder", "text_encoder_2")
    networks = (getattr(pipeline, part, None) for part in parts)
    return [n for n in networks if getattr(n, "peft_config", None)]
