"""A store of pictures under the hash of everything that determines them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from expunge.errors import UserError
from expunge.eval.cases import AS_SUITE, Sampling
from expunge.eval.reasons import MISSING
from expunge.results import sha256_json, whole_file, write_json_atomic, write_text_atomic

Pixels = NDArray[np.uint8]


@contextmanager
def writable(root: Path) -> Iterator[None]:
    """What cannot be written into a store is the user's to mend.

    Raises:
        UserError: An OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"got image store {root}; allowed: a folder that can be written to; "
            f"{error.strerror or error}; free space or choose another with --store, then rerun"
        ) from error


class ImageStore:
    """PNG files named by the hash of (identity of the generator, prompt, seed).

    A picture is written under a temporary name and renamed, so that a reader never sees a part of
    one, and it carries the hash of its pixels, so that a damaged file is found out. Several runs
    may share a store.

    Attributes:
        notes: What was found damaged, for the report.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []

    def key(
        self,
        identity: Mapping[str, Any],
        prompt: str,
        seed: int,
        sampling: Sampling = AS_SUITE,
    ) -> str:
        """The name of a picture."""
        asked = {"prompt": prompt, "seed": seed, **sampling.given()}
        return sha256_json({"identity": identity, **asked})

    def path(self, key: str) -> Path:
        """Where a picture lies, or would."""
        return self.root / key[:2] / f"{key}.png"

    def read(self, key: str) -> Pixels | None:
        """The picture (H, W, 3), or None when it is missing or damaged; damage is noted."""
        path = self.path(key)
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB"))
                text = getattr(image, "text", {})
        except FileNotFoundError:
            return None
        # PIL raises SyntaxError, EOFError, OSError and others, according to what is broken.
        except Exception as error:
            self._note(path, f"{type(error).__name__}: {error}")
            return None
        if text.get("pixels") != hashlib.sha256(pixels.tobytes()).hexdigest():
            self._note(path, "its pixels are not those that were written")
            return None
        return pixels

    def write(self, key: str, pixels: Pixels, prompt: str, seed: int) -> None:
        """Store a picture (H, W, 3).

        Raises:
            UserError: The folder cannot be written to, or the disk is full.
        """
        path = self.path(key)
        information = PngInfo()
        information.add_itxt("prompt", prompt)
        information.add_text("seed", str(seed))
        information.add_text("pixels", hashlib.sha256(pixels.tobytes()).hexdigest())
        with writable(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as stream:
                Image.fromarray(pixels).save(stream, "PNG", pnginfo=information)
            self._failure(key).unlink(missing_ok=True)

    def fail(self, key: str, why: str) -> None:
        """Keep why a picture could not be made, for all processes that look for it.

        Raises:
            UserError: The folder cannot be written to, or the disk is full.
        """
        with writable(self.root):
            self._failure(key).parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(self._failure(key), why)

    def why(self, key: str) -> str:
        """Why there is no picture to read."""
        try:
            return self._failure(key).read_text(encoding="utf-8")
        except OSError:
            return MISSING

    def _failure(self, key: str) -> Path:
        return self.path(key).with_suffix(".txt")

    def describe(self, identity: Mapping[str, Any]) -> None:
        """Leave a note of what an identity is beside its pictures, for people."""
        folder = self.root / "identities"
        with writable(self.root):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{sha256_json(identity)}.json"
            if not path.exists():
                write_json_atomic(path, dict(identity))

    def _note(self, path: Path, why: str) -> None:
        self.notes.append(f"{path.relative_to(self.root)} was damaged and is made again ({why})")
