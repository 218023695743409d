"""W + ΔW folded into a copy of the base: nothing is left that could be switched off."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from expunge.adapters import save_tensors
from expunge.errors import UserError
from expunge.exporting.deltas import Layers
from expunge.exporting.readback import digest

INDEX = "model_index.json"
# What from_pretrained reads without being asked for a variant; a variant (fp16, ema) of the UNet
# would bring the concept back.
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
_SHARDS = re.compile(r"(diffusion_pytorch_model|model)\.safetensors\.index\.json")
_TEXT = (".json", ".txt", ".model")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")


def locate(model: str) -> Path:
    """The folder of a resolved model; what the hub has and the cache has not is downloaded.

    Raises:
        UserError: It cannot be downloaded.
    """
    if Path(model).is_dir():
        return Path(model)
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(model, use_safetensors=True))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"got model {model}, which cannot be downloaded as a whole ({reason}); allowed: a "
            "model in the hub's cache, or a network; or give a folder"
        ) from error


def write(
    base: Path, folder: Path, layers: Layers, dtype: torch.dtype | None, part: str
) -> dict[str, str]:
    """Copy the base's components, in safetensors only, with W + ΔW in place of W.

    The sum is made in float32. Every other tensor keeps its bits, unless another type is asked
    for; so does the safety checker, if there is one. A base that could be loaded lacks no folder
    but of what it does without, and of that the copy's index says so.

    Args:
        base: The base's folder.
        folder: Where to.
        layers: ΔW of the UNet's layers.
        dtype: Of all weights; None leaves each tensor its own, and what was changed in float32
            where its own is coarser.
        part: `pipeline`, or `unet` alone.

    Returns:
        The digest of what each safetensors file should hold, by its name.

    Raises:
        UserError: A component has no safetensors weights, or the UNet not all of the layers.
    """
    index = json.loads((base / INDEX).read_text(encoding="utf-8"))
    listed = [k for k, v in index.items() if isinstance(v, list) and v[0] is not None]
    parts = [k for k in listed if (base / k).is_dir()]
    index |= {k: [None, None] for k in listed if k not in parts}
    if part == "pipeline":
        _write_json(index, folder / INDEX)
        for pattern in _LICENCES:
            for file in filter(Path.is_file, base.glob(pattern)):
                shutil.copyfile(file, folder / file.name)
    digests, found = {}, set()
    for component in ["unet"] if part == "unet" else parts:
        source, target = base / component, folder / component
        target.mkdir()
        weights = [f for f in sorted(source.iterdir()) if _WEIGHTS.fullmatch(f.name)]
        if (source / "config.json").is_file() and not weights:
            raise UserError(
                f"got model component {source}, which has no safetensors weights; allowed: "
                "safetensors files, since a pickle can run code; convert it where you trust it"
            )
        for file in sorted(source.iterdir()):
            if _is_text(file):
                _copy_text(file, target / file.name, dtype)
        for file in weights:
            changes = layers if component == "unet" else {}
            tensors = _read(file)
            changed = {k: _changed(k, v, changes, dtype) for k, v in tensors.items()}
            if all(changed[k] is v for k, v in tensors.items()):
                shutil.copyfile(file, target / file.name)
            else:
                save_tensors(changed, target / file.name, {"format": "pt"})
            digests[f"{component}/{file.name}"] = digest(changed)
            found |= {k.removesuffix(".weight") for k in changed}
    if missing := [name for name in layers if name not in found]:
        raise UserError(
            f"got a base whose UNet files hold no {missing[0]}.weight; allowed: a UNet saved by "
            "diffusers; load it and save it with save_pretrained"
        )
    return digests


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"got {file}, which is no readable safetensors file ({error})") from error


def _changed(key: str, W: Tensor, layers: Layers, dtype: torch.dtype | None) -> Tensor:
    """The tensor to be written in place of one of the base: itself where nothing changes."""
    name = key.removesuffix(".weight")
    if name == key or name not in layers:
        return W.to(dtype) if dtype is not None and W.is_floating_point() else W
    kept = torch.promote_types(W.dtype, torch.float32)
    return (W.to(kept) + layers[name].weight).to(dtype or kept)


def _is_text(file: Path) -> bool:
    """Configurations and vocabularies; of the lists of shards, the one that belongs to a weight."""
    if not file.is_file() or file.suffix not in _TEXT:
        return False
    return ".index." not in file.name or _SHARDS.fullmatch(file.name) is not None


def _copy_text(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    if source.name != "config.json":
        shutil.copyfile(source, target)
        return
    config = json.loads(source.read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and key in config:
            config[key] = str(dtype).removeprefix("torch.")
    _write_json(config, target)


def _write_json(value: dict[str, Any], file: Path) -> None:
    """Without the folder that diffusers notes on saving, which says nothing elsewhere."""
    kept = {k: v for k, v in value.items() if k != "_name_or_path"}
    file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
