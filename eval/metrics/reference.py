"""The features of a folder's pictures, extracted once for all evaluations of a store."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from expunge.errors import UserError
from expunge.eval.features import OpenExtractor, extract
from expunge.eval.generators import threads
from expunge.eval.store import writable
from expunge.pictures import picture_files, read_picture
from expunge.results import sha256_json, whole_file

Values = NDArray[np.float64]
BATCH = 16


class Reference:
    """A folder's pictures as a network sees them.

    Args:
        folder: The pictures.
        extractor: The network.

    Attributes:
        told: Number and hash of the pictures, for protocols.

    Raises:
        UserError: There is no picture, or one that may not be read.
    """

    def __init__(self, folder: Path, extractor: OpenExtractor) -> None:
        self._files, self._extractor = picture_files(folder), extractor
        digest = hashlib.sha256()
        for file in self._files:
            try:
                digest.update(file.read_bytes())
            except OSError as error:
                raise UserError(
                    f"got picture {file}, which cannot be read ({error.strerror}); allowed: a "
                    "picture file; replace or remove it"
                ) from error
        self.told: dict[str, Any] = {"pictures": len(self._files), "sha256": digest.hexdigest()}
        self._found: Values | None = None

    def features(self, keep: Path | None = None) -> Values:
        """(n, D), the pictures by name.

        Args:
            keep: A folder where they are looked for, and left for other evaluations.

        Raises:
            UserError: A broken picture, or `keep` cannot be written to.
        """
        if self._found is None:
            network = self._extractor.protocol()
            table = {"features": network, "reference": self.told, "at once": BATCH}
            file = None if keep is None else keep / "features" / f"{sha256_json(table)[:32]}.npz"
            rows = None if file is None else _read(file, len(self._files))
            if rows is None:
                rows = self._extract()
                if keep is not None and file is not None:
                    with writable(keep):
                        file.parent.mkdir(parents=True, exist_ok=True)
                        with whole_file(file) as stream:
                            np.savez(stream, features=rows)
            self._found = rows.astype(np.float64)
        return self._found

    def _extract(self) -> NDArray[np.float32]:
        rows, waiting = [], list[Tensor]()
        # With one thread, as the models' own pictures: the same to the last bit on any machine.
        with threads(1):
            for file in tqdm(self._files, desc="reference", unit="image", disable=None):
                picture = read_picture(file)
                if waiting and (waiting[0].shape != picture.shape or len(waiting) == BATCH):
                    rows.append(extract(self._extractor, torch.stack(waiting)))
                    waiting.clear()
                waiting.append(picture)
            rows.append(extract(self._extractor, torch.stack(waiting)))
        return np.concatenate(rows)


def _read(file: Path, n: int) -> NDArray[np.float32] | None:
    """The rows of a file, whose checksum tells damage; None if it is not there or not whole."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            rows: NDArray[np.float32] = stored["features"]
    # Of a broken file numpy and zipfile say so with errors of several kinds.
    except Exception:
        return None
    return rows if rows.ndim == 2 and len(rows) == n and np.isfinite(rows).all() else None
