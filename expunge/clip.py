"""CLIP as a differentiable eye: an open_clip model with the preprocessing it was trained with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.backbones import BUNDLED, bundled
from expunge.errors import UserError, nearest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EYE = "eye:"
_TEXT = "A photo of 2 Bombs, naïve & half-hidden."  # words, capitals, digits, accents, signs
_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "model.safetensors")
_ALLOWED = (
    f"emoji, a folder with {_CONFIG}, hf-hub:owner/name, or an ARCHITECTURE/tag of open_clip such "
    "as ViT-B-16/openai"
)
# What open_clip and the libraries below it raise for files that are missing, broken or misfit.
_BROKEN = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    SafetensorError,
)


class VisionTower(nn.Module):
    """A vision tower of transformers that answers to open_clip's name."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def encode_image(self, x: Tensor) -> Tensor:
        """Features (B, D) of normalised pictures (B, 3, H, W)."""
        features: Tensor = self.tower(pixel_values=x).image_embeds
        return features


class Clip:
    """Pictures and texts as unit vectors in one space. Its weights never learn.

    Attributes:
        name: How it was asked for.
        model: Has `encode_image` and, if it reads texts, `encode_text`.
        resolution: The longer side, in pixels, of what the network sees.

    Args:
        name: How it was asked for.
        model: The network, in evaluation mode from now on.
        tokenize: Texts to token ids (M, T); None for a network without texts.
        size: Height and width of the network's input.
        mean: Of the network's training pictures, for channels in [0, 1].
        std: Their standard deviation.
        interpolation: `bicubic` or `bilinear`.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenize: Callable[[list[str]], Tensor] | None,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
    ) -> None:
        self.name = name
        # Convolutions are a third faster so, on the CPU at least; values move by rounding alone.
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.resolution = max(size)
        self.size = size
        self.mean, self.std = tuple(mean), tuple(std)
        self._tokenize = tokenize
        self._interpolation = interpolation

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def to(self, device: Any) -> Clip:
        """The same network on another device."""
        self.model.to(device)
        return self

    @cached_property
    def width(self) -> int:
        """D, the length of its vectors."""
        with torch.no_grad():
            return self.encode_images(torch.zeros(1, 3, *self.size, device=self.device)).shape[1]

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of pictures (B, 3, H, W) in [-1, 1], differentiable in them.

        Raises:
            ValueError: Pictures of another shape, or on another device than the weights.
        """
        return F.normalize(self.image_features(images), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """The same vectors (B, D) in their own length, which some classifiers were trained on.

        A picture of another shape is squashed, never cropped: nothing at its border is overlooked.
        The resize is antialiased as Pillow's, so that it equals the network's own preprocessing.
        All is computed in the precision of the weights, float32, also under autocast.

        Raises:
            ValueError: Pictures of another shape, or on another device than the weights.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"got pictures of shape {tuple(images.shape)}; allowed: (B, 3, H, W)")
        weight = next(self.model.parameters())
        if images.device != weight.device:
            raise ValueError(
                f"got pictures on {images.device} for a CLIP on {weight.device}; move one of them"
            )
        with torch.autocast(weight.device.type, enabled=False):
            x = (images.to(weight.dtype) + 1) / 2
            if x.shape[-2:] != self.size:
                x = F.interpolate(x, self.size, mode=self._interpolation, antialias=True)
            mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
            features: Tensor = self.model.encode_image((x - mean) / std)  # type: ignore[operator]
        return features

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Unit vectors (M, D) of M texts.

        Raises:
            UserError: This CLIP has no text encoder.
            ValueError: No text.
        """
        if self._tokenize is None:
            raise UserError(f"got texts for {self.name}, which only reads pictures")
        if not texts:
            raise ValueError("got no text; allowed: one or more")
        tokens = self._tokenize(list(texts)).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            features: Tensor = self.model.encode_text(tokens)  # type: ignore[operator]
        return F.normalize(features, dim=-1)

    @property
    def undecided(self) -> float | None:
        """The cosine z at which the network gives even odds, σ(s z + b) = ½: z = −b / s.

        Only a network that learned with the sigmoid loss (SigLIP, arXiv 2303.15343) has a bias b;
        None for others, whose cosines are only comparable with each other.
        """
        bias = getattr(self.model, "logit_bias", None)
        if bias is None:
            return None
        return float(-bias / self.model.logit_scale.exp())  # type: ignore[operator]

    @cached_property
    def sha256(self) -> str:
        """Hash of all that its vectors depend on: wherever it came from, what it is.

        Weights and preprocessing, and what has no weights: which GELU, how many heads, what the
        tokenizer makes of a text.
        """
        layers = list(self.model.modules())
        own = (
            (self.size, self.mean, self.std, self._interpolation),
            sorted({type(layer).__name__ for layer in layers if not any(layer.children())}),
            [layer.num_heads for layer in layers if hasattr(layer, "num_heads")],
            self._tokenize and self._tokenize([_TEXT]).tolist(),
        )
        digest = hashlib.sha256(repr(own).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def eye(self) -> str:
        """By what it is known wherever it sees: the hash of the weights that read the pixels.

        However its pictures are prepared and its later layers are laid out, tuned or cut, it is the
        same CLIP that a gradient would please.
        """
        visual = getattr(self.model, "visual", self.model)
        reads = next((p for p in visual.parameters() if p.ndim == 4 and p.shape[1] == 3), None)
        if reads is None:  # no convolution reads them
            return EYE + self.sha256
        return EYE + hashlib.sha256(reads.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def load_clip(name: str, device: Any = "cpu", thesis_compat: bool = False) -> Clip:
    """A CLIP by name.

    Args:
        name: `emoji` (the bundled guide), a local folder with `open_clip_config.json`,
            `hf-hub:owner/name`, or `ARCHITECTURE/tag` as `open_clip.list_pretrained` has them.
        device: Where it runs.
        thesis_compat: Normalise with ImageNet's mean and deviation, as the thesis's code did,
            instead of the network's own.

    Raises:
        UserError: No such CLIP, or it is without weights, broken or not to be had.
    """
    if name in BUNDLED:
        folder = bundled(name) / "guide"
        if not (folder / _CONFIG).is_file():
            raise UserError(
                f"got CLIP {name}, but this installation has no {folder}; allowed: {_ALLOWED}; "
                "install expunge again, or name another"
            )
        return _load(name, f"local-dir:{folder}", None, device, thesis_compat)
    if name and Path(name).is_dir():
        folder = Path(name)
        if not (folder / _CONFIG).is_file():
            raise UserError(
                f"got CLIP folder {name}, which holds no {_CONFIG}; allowed: {_ALLOWED}"
            )
        # Beside pickles open_clip would choose the pickle, were the other file's name not this.
        if not any((folder / weights).is_file() for weights in _WEIGHTS):
            raise UserError(
                f"got CLIP folder {name} without weights; allowed: {' or '.join(_WEIGHTS)} in it; "
                "pickles are not read"
            )
        return _load(name, f"local-dir:{folder}", None, device, thesis_compat)
    if name.startswith("hf-hub:"):
        return _load(name, name, None, device, thesis_compat)
    import open_clip

    # "ViT-B/16/openai" is how OpenAI writes what open_clip calls ViT-B-16.
    architecture, _, tag = name.rpartition("/")
    pair = (architecture.replace("/", "-"), tag)
    known = open_clip.list_pretrained()
    if pair not in known:
        close = nearest(name, [f"{a}/{t}" for a, t in known] + list(BUNDLED))
        hint = f"; did you mean {close}?" if close else ""
        raise UserError(f"got unknown CLIP {name!r}; allowed: {_ALLOWED}{hint}")
    return _load(name, *pair, device, thesis_compat)


def _load(name: str, where: str, tag: str | None, device: Any, thesis_compat: bool) -> Clip:
    import open_clip

    # open_clip only warns when weights were trained with the other GELU, and then scores nonsense.
    quick_gelu = bool(tag and open_clip.get_pretrained_cfg(where, tag).get("quick_gelu", False))
    try:
        model = open_clip.create_model(
            where, pretrained=tag, force_quick_gelu=quick_gelu, require_pretrained=True
        )
        tokenize = open_clip.get_tokenizer(where)
        model = model.to(device)
    except _BROKEN as error:
        line = next((x.strip() for x in str(error).splitlines() if x.strip()), repr(error))
        raise UserError(
            f"got CLIP {name}, which cannot be loaded ({line[:200]}); allowed: {_ALLOWED}; check "
            "the folder or the network"
        ) from error
    own = model.visual.preprocess_cfg
    size = own["size"]
    return Clip(
        name,
        model,
        tokenize,
        (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        IMAGENET_MEAN if thesis_compat else own["mean"],
        IMAGENET_STD if thesis_compat else own["std"],
        "bilinear" if own["interpolation"] == "bilinear" else "bicubic",
    )
