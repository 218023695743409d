"""Published pickles of tensors, read without running what else may be in them.

Only to convert them once (`scripts/convert_pickle.py`): no detector reads a pickle.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.errors import UserError

# All that a pickle of an array of numbers asks for, by the names of NumPy 1 and NumPy 2.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


def read_pickled(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a state dictionary of PyTorch, or the one NumPy array, as `prompts`.

    Raises:
        UserError: The file is missing or broken, holds anything but numbers, or asks for code.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"got {file}, which is no file; allowed: a pickle of tensors")
    content = file.read_bytes()
    try:
        if content.startswith(b"PK"):
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        else:
            found = _Arrays(io.BytesIO(content)).load()
    # A pickle can raise whatever it likes.
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"got {file}, which cannot be read ({said}); allowed: a state dictionary of PyTorch, "
            "or a NumPy array of numbers; nothing else in a pickle is run"
        ) from error
    if isinstance(found, np.ndarray) and found.dtype.kind == "f":
        return {"prompts": torch.from_numpy(found.copy())}
    if isinstance(found, dict) and found and all(isinstance(v, Tensor) for v in found.values()):
        return {str(key): value.contiguous() for key, value in found.items()}
    raise UserError(
        f"got {file}, which holds {type(found).__name__}; allowed: a state dictionary of tensors, "
        "or a NumPy array of numbers"
    )


class _Arrays(pickle.Unpickler):
    """Refuses every class and function but those that NumPy makes an array with."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)
