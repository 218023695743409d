"""Trained heads on one CLIP, such as the multi-headed safety classifier of unsafe images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.clip import Clip, load_clip
from expunge.errors import UserError
from expunge.eval.cases import Observation
from expunge.eval.detectors import check_threshold, finite, label_set

if TYPE_CHECKING:
    from collections.abc import Mapping

_ALLOWED = (
    "a safetensors file of a linear head, weight (1, D) and bias (1,), or of Linear, ReLU, "
    "Dropout, BatchNorm, Linear as PyTorch numbers them; scripts/convert_pickle.py makes one of a "
    ".pt file"
)


@dataclass(frozen=True)
class ClipHeads:
    """p_l(x) = σ(head_l(CLIP(x))) for each label l.

    The five heads of the multi-headed safety classifier (Qu et al., arXiv 2305.13873) read OpenAI's
    ViT-L/14 in its own length. One picture can have several labels, or none.
    """

    heads: dict[str, Path] = field(metadata={"help": "label -> safetensors file of its head"})
    clip: str = field(
        default="ViT-L-14-quickgelu/openai", metadata={"help": "the CLIP below the heads"}
    )
    unit_length: bool = field(
        default=False, metadata={"help": "whether the heads were trained on unit vectors"}
    )
    threshold: float = field(default=0.5, metadata={"help": "seen from this probability on"})
    device: str = field(default="cpu", metadata={"help": "where it runs"})

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if not self.heads:
            raise ValueError("got no heads; allowed: one or more")

    def open(self) -> OpenClipHeads:
        """Load CLIP and the heads.

        Raises:
            UserError: A head is missing, broken or of another layout or width; no such CLIP.
        """
        heads = {label: read_head(file) for label, file in self.heads.items()}
        return OpenClipHeads(load_clip(self.clip, self.device), heads, self)


class OpenClipHeads:
    """The loaded heads with their CLIP, which sees each picture once."""

    def __init__(self, clip: Clip, heads: Mapping[str, nn.Module], settings: ClipHeads) -> None:
        self._clip, self._settings = clip, settings
        self._heads = {label: head.to(settings.device) for label, head in heads.items()}
        self.labels = frozenset(heads)
        digest = hashlib.sha256(clip.sha256.encode())
        for label, head in sorted(heads.items()):
            digest.update(label.encode())
            for key, value in head.state_dict().items():
                digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
            width = next(iter(head.parameters())).shape[1]
            if width != clip.width:
                raise UserError(
                    f"got head {settings.heads[label]} of width {width} for CLIP {clip.name} of "
                    f"width {clip.width}; allowed: the CLIP that it was trained on"
                )
        self._weights = digest.hexdigest()

    def protocol(self) -> dict[str, Any]:
        """Hash of CLIP and heads, and the threshold."""
        unit = self._settings.unit_length
        return {
            "detector": "clip_heads",
            "name": "clip_heads",
            "version": 1,
            "weights": self._weights,
            "clip": Path(self._settings.clip).name,
            "clips": [self._clip.eye],
            "label set": label_set(self.labels),
            "threshold": self._settings.threshold,
            "colour order": "rgb",
            "input": f"squashed to {self._clip.resolution}",
            "unit length": unit,
            "unusual": {"unit_length": unit} if unit else {},
        }

    @torch.no_grad()
    def observe(self, images: Tensor) -> list[Observation]:
        """The probability of each label for pictures (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: Pictures of another shape.
            FloatingPointError: A score is NaN or infinite.
        """
        clip = self._clip
        encode = clip.encode_images if self._settings.unit_length else clip.image_features
        features = encode(images.to(self._settings.device)).float()
        columns = {
            label: head(features).squeeze(1).sigmoid().tolist()
            for label, head in self._heads.items()
        }
        return [
            finite({label: column[i] for label, column in columns.items()})
            for i in range(len(images))
        ]


def read_head(file: Path) -> nn.Module:
    """A head from its safetensors file: (B, D) to logits (B, 1), in evaluation mode.

    Raises:
        UserError: The file is missing or broken, or its tensors are of another layout.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise UserError(f"got head {file}, which does not exist; allowed: {_ALLOWED}")
    try:
        tensors = {key: value.float() for key, value in load_file(file).items()}
        head = _build(tensors)
        head.load_state_dict(tensors)
    except (OSError, KeyError, IndexError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"got head {file}, which cannot be read ({said}); allowed: {_ALLOWED}"
        ) from error
    if not all(value.isfinite().all() for value in tensors.values()):
        raise UserError(f"got head {file}, which holds NaN or infinities; get it again")
    return head.eval().requires_grad_(False)


def _build(tensors: Mapping[str, Tensor]) -> nn.Module:
    if "weight" in tensors:
        return nn.Linear(tensors["weight"].shape[1], 1)
    hidden, width = tensors["0.weight"].shape
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.ReLU(),
        nn.Dropout(),
        nn.BatchNorm1d(hidden),
        nn.Linear(hidden, 1),
    )
