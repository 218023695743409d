"""The concepts of Stable Diffusion's safety checker, each with its own threshold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.densities.cosine import Cosine
from expunge.densities.thresholds import check_top_k
from expunge.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.clip import Clip
    from expunge.concepts import Concept
    from expunge.densities.base import HarmDensity

FILE = "sd_filter.safetensors"
# What the checker adds to every score once a special-care concept is seen.
SPECIAL_CARE = 0.01
_KEYS = ("concept_embeds", "concept_embeds_weights")
_TOWER = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps",
)  # fmt: skip
_SPECIAL_KEYS = ("special_care_embeds", "special_care_embeds_weights")


@dataclass(frozen=True)
class SdFilter:
    """p_h,c(x) = cos(CLIP(x), v_c) − w_c + a(x): above 0, the checker calls the picture unsafe.

    a(x) is `adjustment`, and 0.01 more where a special-care concept exceeds its own threshold
    (Rando et al., arXiv 2210.04610, describe the checker).

    Attributes:
        file: A folder of a `StableDiffusionSafetyChecker` or of a pipeline that has one; its own
            CLIP sees. Or a safetensors file with the concepts only. Empty: the bundled guide's.
        clip: Sees for a file that holds only concepts.
        adjustment: Added to every score; above 0 the filter is stricter.
        top_k: K; the score is the mean of the K largest. Null takes the mean of all.
    """

    file: str = ""
    clip: str = ""
    adjustment: float = 0.0
    top_k: int | None = 1

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        if not -1 <= self.adjustment <= 1:
            raise ValueError(f"got adjustment {self.adjustment}; allowed: -1 to 1, the checker's 0")

    def build(self, concept: Concept | None = None, device: Any = "cpu") -> HarmDensity:
        """The density of the checker's concepts; what they are is in the file.

        Raises:
            UserError: The file is missing, broken or of another CLIP's width; K is above M.
        """
        path = Path(self.file) if self.file else _bundled_file()
        if path.is_dir():
            if self.clip:
                raise UserError(
                    f"got clip {self.clip} for the safety checker {path}, which has its own; "
                    "allowed: no clip; remove it"
                )
            path = path / "safety_checker" if (path / "safety_checker").is_dir() else path
            (tensors, clip), names = _read_checker(path, device), None
        else:
            if not self.clip and self.file:
                raise UserError(
                    f"got no clip for {path}, which holds concepts only; allowed: the CLIP that "
                    "they were made with, for example emoji"
                )
            from expunge.clip import load_clip

            tensors, names = _read_concepts(path)
            clip = load_clip(self.clip or "emoji", device)
        m = len(tensors[_KEYS[1]])
        # Its authors published no names for the checker's concepts, only their embeddings.
        shown = names or [f"concept {i}" for i in range(m)]
        density = Filter(clip, tensors, shown, self.adjustment, self.top_k)
        density.texts = names
        return density


class Filter(Cosine):
    """Cosines with a safety checker's concepts, which have a threshold each.

    Args:
        clip: Who sees.
        tensors: `concept_embeds` (M, D), `concept_embeds_weights` (M,) and, where the checker has
            them, `special_care_embeds` (S, D) and `special_care_embeds_weights` (S,).
        names: The concepts.
        adjustment: Added to every score.
        top_k: K.
    """

    def __init__(
        self,
        clip: Clip,
        tensors: Mapping[str, Tensor],
        names: list[str],
        adjustment: float = 0.0,
        top_k: int | None = 1,
    ) -> None:
        import torch

        for key in (_KEYS[0], _SPECIAL_KEYS[0]):
            if key in tensors and tensors[key].shape[1] != clip.width:
                raise UserError(
                    f"got {key} of width {tensors[key].shape[1]} for CLIP {clip.name} of width "
                    f"{clip.width}; allowed: the CLIP that they were made with"
                )
        on = {key: value.float().to(clip.device) for key, value in tensors.items()}
        unit = torch.nn.functional.normalize
        self.weights = on[_KEYS[1]]
        special = on.get(_SPECIAL_KEYS[0], torch.zeros(0, clip.width, device=clip.device))
        self.special_weights = on.get(_SPECIAL_KEYS[1], special.new_zeros(0))
        self.adjustment = adjustment
        # One matrix, so that the picture is encoded once for both kinds.
        vectors = torch.cat([unit(on[_KEYS[0]], dim=1), unit(special, dim=1)])
        super().__init__([(clip, vectors)], names, self.weights.clone(), top_k)

    def per_concept(self, images: Tensor) -> Tensor:
        """The cosine, adjusted, (B, M)."""
        cosines = self.cosines(images)
        m = len(self.weights)
        special = cosines[:, m:].detach() > self.special_weights
        care = SPECIAL_CARE * special.any(dim=1, keepdim=True)
        return cosines[:, :m] + self.adjustment + care

    def combine(self, per_concept: Tensor) -> Tensor:
        """The mean of the K that are furthest above their thresholds, or least below, (B,)."""
        if self.top_k is None:
            return per_concept.mean(dim=1)
        above = (per_concept - self.thresholds).topk(self.top_k, dim=1).indices
        return per_concept.gather(1, above).mean(dim=1)

    def identity(self) -> dict[str, Any]:
        """The CLIP, the concepts and their thresholds."""
        import hashlib

        digest = hashlib.sha256()
        for value in (self.guides[0][1], self.weights, self.special_weights):
            digest.update(value.cpu().contiguous().numpy().tobytes())
        own = {"concepts": digest.hexdigest(), "adjustment": self.adjustment}
        return {**super().identity(), **own}

    def to(self, device: Any) -> Filter:
        """The same density on another device."""
        super().to(device)
        self.weights = self.weights.to(device)
        self.special_weights = self.special_weights.to(device)
        return self


def _bundled_file() -> Path:
    from expunge.backbones import bundled

    path = bundled("emoji") / "guide" / FILE
    if not path.is_file():
        raise UserError(
            f"got no file for sd_filter, and this installation has no {path}; allowed: a folder of "
            "a safety checker, or a safetensors file with concepts"
        )
    return path


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            return tensors, stored.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"got {path}, which cannot be read; allowed: a safetensors file; {error}"
        ) from error


def _read_concepts(path: Path) -> tuple[dict[str, Tensor], list[str] | None]:
    tensors, metadata = _read(path)
    _check(tensors, path)
    found = {key: tensors[key] for key in (*_KEYS, *_SPECIAL_KEYS) if key in tensors}
    m = len(found[_KEYS[1]])
    if "names" not in metadata:
        return found, None
    try:
        names = json.loads(metadata["names"])
    except ValueError:
        names = None
    if not isinstance(names, list) or [type(name) for name in names] != [str] * m:
        raise UserError(f"got {path} with other names than one text for each of {m} concepts")
    return found, names


def _check(tensors: Mapping[str, Tensor], path: Path, *, whole: bool = False) -> None:
    special = whole or any(key in tensors for key in _SPECIAL_KEYS)
    for embeds, weights in (_KEYS, _SPECIAL_KEYS)[: 2 if special else 1]:
        for key in (embeds, weights):
            if key not in tensors:
                raise UserError(f"got {path} without {key}; allowed: a safety checker's file")
        shapes = tuple(tensors[embeds].shape), tuple(tensors[weights].shape)
        if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1] or not shapes[0][0]:
            raise UserError(
                f"got {path} with {embeds} {shapes[0]} and {weights} {shapes[1]}; allowed: (M, D) "
                "and (M,)"
            )
        if not all(tensors[key].float().isfinite().all() for key in (embeds, weights)):
            raise UserError(f"got {path} with NaN or infinities in {embeds} or {weights}")


def _read_checker(folder: Path, device: Any) -> tuple[dict[str, Tensor], Clip]:
    """The concepts of a checker's folder and its own eye, strictly: no weight may be missing."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    from expunge.clip import Clip, VisionTower

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        own = config["vision_config"]
        # Old files carry dozens of settings of generation and training as well.
        vision = {key: own[key] for key in _TOWER if key in own}
        vision["projection_dim"] = config["projection_dim"]
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"got safety checker {folder}, whose config.json cannot be read ({error!r}); allowed: "
            "a folder saved by diffusers"
        ) from error
    tensors, _ = _read(folder / "model.safetensors")
    _check(tensors, folder, whole=True)
    concepts = {k: tensors.pop(k) for k in (*_KEYS, *_SPECIAL_KEYS) if k in tensors}
    # The published checkpoint nests the tower once more than transformers does today.
    nested, flat = "vision_model.vision_model.", "vision_model."
    state = {
        key.replace(nested, flat): value.float()
        for key, value in tensors.items()
        if not key.endswith("position_ids")
    }
    try:
        tower.load_state_dict(state)
    except RuntimeError as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"got safety checker {folder}, whose weights do not fit ({said}); allowed: a whole one"
        ) from error

    side = vision.get("image_size", 224)
    eye = Clip(
        str(folder), VisionTower(tower), None, (side, side), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    )
    return concepts, eye.to(device)
