"""Decoders that `expunge distill-decoder` makes for one VAE, and the file that holds them.

The file is safetensors, `clip.*` and `linear.*`, with a JSON header that says for which VAE.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.decoding.base import Decoder, digests, latent_channels
from expunge.decoding.settings import FOLDER, check_size
from expunge.errors import UserError
from expunge.results import temporary_beside
from expunge.schema import Context, decode_section

FILE = "decoder.safetensors"
METADATA = "expunge"
GROUPS = 8


@dataclass(frozen=True)
class Header:
    """What a decoder's file says of itself.

    Attributes:
        latent_channels: C.
        scaling_factor: Of the VAE's latents.
        vae_sha256: `digests` of the VAE it was distilled from.
        up: Pixels for each latent along a side, of the `clip` decoder.
        resolution: Its shorter side in pixels at the model's own size.
        width: Channels of its network.
        depth: Its residual blocks.
    """

    latent_channels: int
    scaling_factor: float
    vae_sha256: dict[str, str]
    up: int
    resolution: int
    width: int
    depth: int

    def __post_init__(self) -> None:
        if not 1 <= self.latent_channels <= 64:
            raise ValueError(f"got latent_channels {self.latent_channels}; allowed: 1 to 64")
        if self.up not in (1, 2, 4, 8, 16):
            raise ValueError(f"got up {self.up}; allowed: 1, 2, 4, 8, 16")
        check_size(self.width, self.depth)


def load_clip(path: str | None, pipeline: Any) -> Decoder:
    """The network of a decoder's file, if it was distilled from this pipeline's VAE.

    Raises:
        UserError: No such file, a broken one, or one for another VAE.
    """
    file = locate(path, pipeline)
    header, state = read(file, pipeline)
    network = ClipNetwork(header.latent_channels, header.up, header.width, header.depth)
    _fill(network, state, "clip.", file)
    return Decoder(network, header.latent_channels, header.up)


def load_linear(path: str | None, pipeline: Any) -> Decoder:
    """The linear map of a decoder's file, if it was fitted to this pipeline's VAE.

    Raises:
        UserError: No such file, a broken one, or one for another VAE.
    """
    file = locate(path, pipeline)
    header, state = read(file, pipeline)
    network = nn.Conv2d(header.latent_channels, 3, 1)
    _fill(network, state, "linear.", file)
    return Decoder(network, header.latent_channels, 1)


class ClipNetwork(nn.Module):
    """Latents (B, C, h, w) -> pictures (B, 3, h·up, w·up).

    A linear decoder, to which residual blocks at the latents' size and one at twice it add what
    is missing; pixels then come out of channels by shuffling (arXiv 1609.05158), so that nearly all
    of the arithmetic is at the latents' size. Group norm sees the whole picture, as the VAE's does.

    Args:
        channels: C.
        up: A power of two.
        width: Channels inside, a multiple of 16.
        depth: Residual blocks at the latents' size.
    """

    def __init__(self, channels: int, up: int, width: int, depth: int) -> None:
        super().__init__()
        check_size(width, depth)
        self.up = up
        self.base = nn.Conv2d(channels, 3 * up * up, 1)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.body = nn.Sequential(*[Residual(width) for _ in range(depth)])
        self.rise = nn.Sequential()
        if up > 1:
            half = width // 2
            self.rise = nn.Sequential(
                nn.Conv2d(width, 4 * half, 3, padding=1), nn.PixelShuffle(2), Residual(half)
            )
            width, up = half, up // 2
        self.head = nn.Conv2d(width, 3 * up * up, 3, padding=1)
        # At first it is the linear decoder alone.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, h·up, w·up)."""
        fine = self.head(self.rise(self.body(self.stem(latents))))
        fine = F.pixel_shuffle(fine, max(1, self.up // 2))
        return fine + F.pixel_shuffle(self.base(latents), self.up)

    @torch.no_grad()
    def start_from(self, linear: nn.Conv2d) -> None:
        """Begin as this linear decoder: every pixel of a latent has its colour."""
        places = self.up**2
        self.base.weight.copy_(linear.weight.repeat_interleave(places, 0))
        self.base.bias.copy_(linear.bias.repeat_interleave(places))  # type: ignore[union-attr]


class Residual(nn.Module):
    """x + conv(silu(conv(silu(norm(x)))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> the same shape."""
        y: Tensor = x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))
        return y


def beside(pipeline: Any) -> Path | None:
    """Where the pipeline's own decoder would be; None for a model that is no local folder."""
    model = pipeline.config.get("_name_or_path")
    return Path(model) / FOLDER if model and Path(model).is_dir() else None


def locate(path: str | None, pipeline: Any) -> Path:
    """The decoder's file: at this path, or beside the model.

    Raises:
        UserError: There is none.
    """
    model = pipeline.config.get("_name_or_path")
    own = beside(pipeline)
    place = Path(path) if path else own
    if place is None:
        raise UserError(
            f"got no path of a decoder for {model or 'this pipeline'}; allowed: what expunge "
            "distill-decoder wrote; set its path"
        )
    file = place / FILE if place.is_dir() or place == own else place
    if not file.is_file():
        raise UserError(
            f"got no decoder: {file} does not exist; make it with: expunge distill-decoder "
            f"--model {model or 'MODEL'} --output_dir {file.parent}"
        )
    return file


def read(file: Path, pipeline: Any) -> tuple[Header, dict[str, Tensor]]:
    """A decoder's header and tensors, checked against the pipeline's VAE.

    Raises:
        UserError: The file is broken, holds NaN, or was made from another VAE.
    """
    allowed = "allowed: a file of expunge distill-decoder; make it again"
    try:
        with safe_open(file, framework="pt") as stream:
            text = (stream.metadata() or {}).get(METADATA)
            state = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"got decoder {file}, which cannot be read ({error}); {allowed}") from error
    try:
        values = json.loads(text or "null")
        header: Header = decode_section(Header, values, (), Context(Header, str(file)))
    except ValueError as error:
        raise UserError(f"got decoder {file} with a broken header ({error}); {allowed}") from error
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise UserError(f"got decoder {file}, which holds NaN; {allowed}")
    _check_fit(header, file, pipeline)
    return header, state


def write(folder: Path, header: Header, clip: ClipNetwork, linear: nn.Conv2d) -> Path:
    """Write both decoders of a VAE to `decoder.safetensors`, whole or not at all.

    Raises:
        FloatingPointError: The weights are not finite.
    """
    parts = {"clip": clip, "linear": linear}
    state = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise FloatingPointError("the distilled decoder holds NaN; lower the learning rate")
    temporary = temporary_beside(folder / FILE)
    try:
        # One key only: safetensors writes several in a random order.
        save_file(state, temporary, metadata={METADATA: json.dumps(asdict(header))})
        temporary.chmod(0o644)
        temporary.replace(folder / FILE)
    finally:
        temporary.unlink(missing_ok=True)
    return folder / FILE


def _check_fit(header: Header, file: Path, pipeline: Any) -> None:
    channels, scale = latent_channels(pipeline), float(pipeline.vae.config.scaling_factor)
    if header.latent_channels != channels:
        what = f"for latents of {header.latent_channels} channels; allowed: {channels}"
    elif abs(header.scaling_factor - scale) > 1e-6 * scale:
        what = f"for latents scaled by {header.scaling_factor:g}; allowed: {scale:g}"
    elif not header.vae_sha256.items() & digests(pipeline.vae).items():
        what = "distilled from another VAE; allowed: one of this model's VAE"
    else:
        return
    raise UserError(f"got decoder {file}, {what}; make one with expunge distill-decoder")


def _fill(network: nn.Module, state: dict[str, Tensor], prefix: str, file: Path) -> None:
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(
            f"got decoder {file}, whose weights do not fit its header ({lines[-1]}); allowed: a "
            "file of expunge distill-decoder; make it again"
        ) from error
