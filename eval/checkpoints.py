"""Weights in files: read without running what a pickle may hold, downloaded once, hashed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from expunge.errors import UserError


def read_tensors(path: Path, what: str, where: str) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file, or of a PyTorch file that holds no code.

    A checkpoint that nests them under `state_dict` is unwrapped.

    Args:
        path: The file.
        what: What it should hold, for errors: "the aesthetic head".
        where: Where to get it.

    Raises:
        UserError: The file is missing, or is none of the two.
    """
    if not Path(path).is_file():
        raise UserError(
            f"got no {what} at {path}; allowed: a .safetensors or PyTorch file; get it from {where}"
        )
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    # Both libraries have several errors of their own for what is not theirs.
    except Exception as error:
        raise UserError(
            f"got {path} for {what}, which cannot be read ({type(error).__name__}); allowed: a "
            f".safetensors or PyTorch file that holds tensors alone; get it from {where}"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise UserError(f"got {path} for {what}, which holds no named tensors; get it from {where}")
    return found


def load_into(module: nn.Module, tensors: dict[str, Tensor], path: Path, what: str) -> None:
    """Fill a network with all of the tensors and nothing but them, in evaluation mode.

    Raises:
        UserError: They do not fit.
    """
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(
            f"got {path} for {what}, which does not fit it ({lines[min(1, len(lines) - 1)][:120]})"
        ) from error
    module.eval().requires_grad_(False)


def cached_download(url: str, what: str) -> Path:
    """The file of a URL in PyTorch's folder of checkpoints, downloaded when it is not there yet.

    Raises:
        UserError: It is not there and cannot be downloaded.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(urlparse(url).path).name
    if not file.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), progress=False)
        except OSError as error:
            raise UserError(
                f"got no {what}, and cannot download them ({error}); put {url} at {file}"
            ) from error
    return file


def state_sha256(module: nn.Module) -> str:
    """The hash of a network's weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
