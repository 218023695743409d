"""The settings of every decoder, without torch, so that mistakes in them answer at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from expunge.decoding.base import Decoder

FOLDER = "clip_decoder"  # inside a model's own folder: where a distilled decoder is looked for


@runtime_checkable
class DecoderConfig(Protocol):
    """The settings of a decoder: a frozen dataclass, listed in the table."""

    def build(self, pipeline: Any) -> Decoder:
        """The decoder, for latents of this pipeline.

        Raises:
            UserError: Weights are missing, broken or made for another model.
        """
        ...


@dataclass(frozen=True)
class Vae:
    """The pipeline's own VAE: exact, and the dearest.

    x = D(z · σ / s + m), with s the VAE's scaling factor, m its shift and σ its standard deviations
    where it has them: what the pipeline itself does after its last step.
    """

    def build(self, pipeline: Any) -> Decoder:
        """The decoder; see `autoencoders.from_pipeline`."""
        from expunge.decoding.autoencoders import from_pipeline

        return from_pipeline(pipeline)


@dataclass(frozen=True)
class Tiny:
    """A diffusers AutoencoderTiny (TAESD): full size, an eighteenth of SD 1.x's arithmetic.

    Attributes:
        path: A folder or a hub id; None is the TAESD of the model's family.
    """

    path: str | None = field(
        default=None, metadata={"help": "folder or hub id; default: the model family's TAESD"}
    )

    def build(self, pipeline: Any) -> Decoder:
        """The decoder; see `autoencoders.tiny`."""
        from expunge.decoding.autoencoders import tiny

        return tiny(self.path, pipeline)


@dataclass(frozen=True)
class Clip:
    """A small network, distilled from the VAE, that renders only the pixels CLIP needs.

    Attributes:
        path: The file or folder that `expunge distill-decoder` wrote; None is the folder
            `clip_decoder` beside the model's own parts.
    """

    path: str | None = field(
        default=None, metadata={"help": f"file or folder; default: {FOLDER} in the model's folder"}
    )

    def build(self, pipeline: Any) -> Decoder:
        """The decoder; see `distilled.load_clip`."""
        from expunge.decoding.distilled import load_clip

        return load_clip(self.path, pipeline)


@dataclass(frozen=True)
class Linear:
    """x = A z + b at every latent: one colour each, A (3, C) by least squares.

    Attributes:
        path: As for `Clip`: one file holds both.
    """

    path: str | None = field(
        default=None, metadata={"help": f"file or folder; default: {FOLDER} in the model's folder"}
    )

    def build(self, pipeline: Any) -> Decoder:
        """The decoder; see `distilled.load_linear`."""
        from expunge.decoding.distilled import load_linear

        return load_linear(self.path, pipeline)


@dataclass(frozen=True)
class Auto:
    """The cheapest that sees well: `clip` where the model's folder holds one, else the VAE.

    A decoder that is there and does not fit the model is an error, not a reason for the VAE.
    """

    def build(self, pipeline: Any) -> Decoder:
        """The decoder."""
        from expunge.decoding.autoencoders import from_pipeline
        from expunge.decoding.distilled import beside, load_clip

        folder = beside(pipeline)
        if folder is not None and folder.is_dir():
            return load_clip(None, pipeline)
        return from_pipeline(pipeline)


def check_size(width: int, depth: int) -> None:
    """Refuse a network that group norm cannot split, or none at all.

    Raises:
        ValueError: Width or depth out of range.
    """
    if not 16 <= width <= 512 or width % 16:
        raise ValueError(f"got width {width}; allowed: a multiple of 16 from 16 to 512")
    if not 1 <= depth <= 32:
        raise ValueError(f"got depth {depth}; allowed: 1 to 32")
