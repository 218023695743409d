"""A classifier on CLIP features: a head trained on a few pictures, or Q16's two prompt vectors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.densities.base import HarmDensity
from expunge.densities.clip_text import check_clips
from expunge.densities.thresholds import check_threshold, spread_threshold
from expunge.errors import UserError
from expunge.results import temporary_beside

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.clip import Clip
    from expunge.concepts import Concept

FORMAT = "expunge.clip_head/1"
# CLIP's own scale of cosines, which Q16's vectors were tuned with.
LOGIT_SCALE = 100.0
_PICKLES = (".bin", ".ckpt", ".p", ".pickle", ".pkl", ".pt", ".pth")
_ALLOWED = (
    "a head that expunge trained, or two prompt vectors (2, D), harmless first, as .safetensors "
    "or .npy"
)


@dataclass(frozen=True)
class ClipHead:
    """p_h(x) = σ(head(CLIP(x))), the probability that a picture is harmful.

    The head is linear or has one hidden layer. A file of two prompt vectors v (Q16, arXiv
    2202.06675: harmless, harmful) gives p_h(x) = softmax(100 · cos(CLIP(x), v))_harmful instead.

    Attributes:
        file: The head.
        clip: The CLIP below it; empty takes the one that the file names.
        threshold: η, a probability.
        name: What the concept is called; the file's word for it when empty.
    """

    file: str
    clip: str = ""
    threshold: float = 0.5
    name: str = ""

    def __post_init__(self) -> None:
        check_threshold(self.threshold, 0, 1)

    def build(self, concept: Concept | None = None, device: Any = "cpu") -> HarmDensity:
        """The density of the file's head.

        Raises:
            UserError: The file is missing, broken or a pickle; it names no CLIP, or was made for
                another one, or has another width.
        """
        head = read_head(self.file)
        clip_name = self.clip or head.clip
        if not clip_name:
            raise UserError(
                f"got head {self.file}, which names no CLIP; allowed: the CLIP that it was made "
                "with; set clip, for example ViT-L-14/openai"
            )
        check_clips(clip_name)
        from expunge.clip import load_clip

        clip = load_clip(clip_name, device)
        if head.width != clip.width:
            raise UserError(
                f"got head {self.file} of width {head.width} for CLIP {clip_name} of width "
                f"{clip.width}; allowed: the CLIP that it was made with"
                + (f", {head.clip}" if head.clip else "")
            )
        if head.sha256 and head.sha256 != clip.sha256:
            raise UserError(
                f"got head {self.file}, trained on other weights than CLIP {clip_name} has; "
                "allowed: the same CLIP; train the head again"
            )
        name = self.name or (concept.name if concept is not None else "") or head.name
        names = [name or Path(self.file).stem]
        return Probe(clip, head, names, spread_threshold(self.threshold, names, device))


@dataclass
class Head:
    """A probe of unit CLIP features (B, D).

    Attributes:
        tensors: `weight` (1, D) and `bias` (1,); with a hidden layer `hidden.weight` (H, D) and
            `hidden.bias` (H,) as well, and `weight` (1, H). Or `prompts` (2, D) alone.
        clip: The CLIP it was made with, as it was asked for; empty when nobody knows.
        sha256: Of that CLIP.
        name: What it sees.
    """

    tensors: dict[str, Tensor]
    clip: str = ""
    sha256: str = ""
    name: str = ""

    @property
    def width(self) -> int:
        """D."""
        first = next(k for k in ("prompts", "hidden.weight", "weight") if k in self.tensors)
        return self.tensors[first].shape[1]

    def logits(self, features: Tensor) -> Tensor:
        """(B,): above 0 means harmful."""
        parts = {key: value.to(features.dtype) for key, value in self.tensors.items()}
        if "prompts" in parts:
            unit = parts["prompts"] / parts["prompts"].norm(dim=1, keepdim=True)
            # A softmax of two is the sigmoid of their difference.
            difference: Tensor = LOGIT_SCALE * features @ (unit[1] - unit[0])
            return difference
        if "hidden.weight" in parts:
            inner = features @ parts["hidden.weight"].T + parts["hidden.bias"]
            # SiLU: smooth, so that no unit is without gradient.
            features = inner * inner.sigmoid()
        return (features @ parts["weight"].T + parts["bias"]).squeeze(1)


class Probe(HarmDensity):
    """σ of a head's logit."""

    def __init__(self, clip: Clip, head: Head, names: list[str], thresholds: Tensor) -> None:
        self.clip, self.head, self.names, self.thresholds = clip, head, names, thresholds
        self.resolution = clip.resolution
        self._move(clip.device)

    def per_concept(self, images: Tensor) -> Tensor:
        """The probability, (B, 1)."""
        return self.head.logits(self.clip.encode_images(images)).sigmoid()[:, None]

    def identity(self) -> dict[str, Any]:
        """The CLIP and the head."""
        digest = hashlib.sha256()
        for key, value in sorted(self.head.tensors.items()):
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
        told = {"clips": [self.clip.eye], "weights": self.clip.sha256, "head": digest.hexdigest()}
        return {**super().identity(), **told}

    def to(self, device: Any) -> Probe:
        """The same density on another device."""
        super().to(device)
        self.clip.to(device)
        self._move(device)
        return self

    def _move(self, device: Any) -> None:
        self.head.tensors = {k: v.float().to(device) for k, v in self.head.tensors.items()}


def read_head(path: str | Path) -> Head:
    """A head or two prompt vectors from a safetensors or npy file. Pickles are never opened.

    Raises:
        UserError: The file is missing, broken, a pickle, or holds something else.
    """
    file = Path(path)
    if file.suffix in _PICKLES:
        raise UserError(
            f"got head {file}, a pickle, which could run any code; allowed: {_ALLOWED}; convert it"
        )
    if not file.is_file():
        raise UserError(f"got head {file}, which does not exist; allowed: {_ALLOWED}")
    import numpy as np
    import torch
    from safetensors import SafetensorError, safe_open

    metadata: dict[str, str] = {}
    try:
        if file.suffix == ".npy":
            tensors = {"prompts": torch.from_numpy(np.load(file, allow_pickle=False))}
        else:
            with safe_open(file, framework="pt") as stored:
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
                metadata = stored.metadata() or {}
    except (OSError, EOFError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"got head {file}, which cannot be read; allowed: {_ALLOWED}; {error}"
        ) from error
    if len(tensors) == 1 and "weight" not in tensors:
        # Files of prompt vectors call them what they like.
        tensors = {"prompts": next(iter(tensors.values()))}
    _check_shapes(tensors, file)
    try:
        about = json.loads(metadata.get("expunge", "{}"))
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise UserError(f"got head {file} with a broken header; allowed: {_ALLOWED}")
    return Head(tensors, about.get("clip", ""), about.get("sha256", ""), about.get("name", ""))


def write_head(path: str | Path, head: Head, about: Mapping[str, Any]) -> None:
    """Write a head whole or not at all; `about` goes into the file's header as JSON."""
    from safetensors.torch import save_file

    target = Path(path)
    temporary = temporary_beside(target)
    own = {"format": FORMAT, "clip": head.clip, "sha256": head.sha256, "name": head.name}
    tensors = {key: value.contiguous() for key, value in head.tensors.items()}
    try:
        save_file(tensors, temporary, metadata={"expunge": json.dumps({**own, **about})})
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _check_shapes(tensors: Mapping[str, Tensor], file: Path) -> None:
    shapes = {key: tuple(value.shape) for key, value in sorted(tensors.items())}
    match shapes:
        case {"prompts": (2, _), **rest}:
            fits = not rest
        case {"hidden.weight": (h, _), "hidden.bias": (b,), "weight": (1, w), "bias": (1,), **rest}:
            fits = not rest and h == b == w
        case {"weight": (1, _), "bias": (1,), **rest}:
            fits = not rest
        case _:
            fits = False
    if not fits:
        shown = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
        raise UserError(f"got head {file} with {shown or 'nothing'}; allowed: {_ALLOWED}")
    if not all(value.float().isfinite().all() for value in tensors.values()):
        raise UserError(f"got head {file}, which holds NaN or infinities; train it again")
