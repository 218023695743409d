"""`expunge distill-decoder`: a decoder for densities, made for one VAE from random prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from expunge.configuration import parse
from expunge.decoding.settings import check_size
from expunge.densities import DENSITIES
from expunge.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.decoding.distill import Pairs
    from expunge.decoding.distilled import Header

RESULT = "distill_result.json"
SCHEMA = 1
CLIP_PIXELS = 224  # what the CLIPs of Stable Diffusion's time look at
POOL_BYTES = 8 << 30  # what the pictures to learn from may take of the machine's memory


@dataclass(frozen=True)
class DistillConfig:
    """How a decoder is distilled."""

    output_dir: str = field(metadata={"help": "folder for the decoder"})
    model: str = field(default="emoji", metadata={"help": "emoji, a diffusers folder, a hub id"})
    prompts: Path | None = field(
        default=None,
        metadata={"help": "text file, one a line; default: the model's vocabulary, or everyday"},
    )
    images: int = field(default=512, metadata={"help": "pictures to learn from"})
    held_out: int = field(default=32, metadata={"help": "pictures to measure with"})
    stages: int = field(default=5, metadata={"help": "x̂0 of each picture, from first to last step"})
    sampling_steps: int = field(default=20, metadata={"help": "denoising steps of a picture"})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "default: what suits the model (emoji 4, others 7.5)"}
    )
    resolution: int | None = field(
        default=None,
        metadata={"help": f"pixels to reach; default: {CLIP_PIXELS}, or the model's if smaller"},
    )
    width: int = field(default=48, metadata={"help": "channels of the network"})
    depth: int = field(default=3, metadata={"help": "its residual blocks"})
    steps: int = field(default=3000, metadata={"help": "training steps"})
    batch_size: int = 16
    learning_rate: float = 2e-3
    seed: int = 0
    density: Annotated[Any, DENSITIES] | None = field(
        default=None, metadata={"help": "report each decoder's agreement with the VAE in this p_h"}
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        least = {"images": 1, "held_out": 1, "stages": 1, "steps": 1, "batch_size": 1}
        for name, low in (least | {"sampling_steps": self.stages}).items():
            if getattr(self, name) < low:
                raise ValueError(f"got {name} {getattr(self, name)}; allowed: {low} or more")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"got learning_rate {self.learning_rate}; allowed: above 0, to 1")
        check_size(self.width, self.depth)


def main(argv: list[str]) -> None:
    """Distil, and write `decoder.safetensors` and `distill_result.json`."""
    config = parse(DistillConfig, argv, "expunge distill-decoder")
    # torch is imported late so that --help and mistakes answer at once.
    import time

    import torch

    from expunge import backbones
    from expunge.decoding import distilled
    from expunge.results import fresh_output_dir, provenance, sha256_file, write_json_atomic

    folder = Path(config.output_dir)
    if config.overwrite and not (folder / RESULT).is_file():
        # A training's folder carries expunge's marker too; only a decoder makes way for a decoder.
        fresh_output_dir(folder, dry_run=True)
    fresh_output_dir(folder, config.overwrite, dry_run=True)
    prompts = _prompts(config)
    device = backbones.device_of(config.device)
    begun = time.perf_counter()
    pipeline = backbones.load_pipeline(config.model, device=device)
    header = _header(config, pipeline)
    density = config.density.build(None, device) if config.density is not None else None
    if density is not None:
        # What the density cannot do should not be found out after minutes of learning.
        blank = torch.zeros(1, 1, *backbones.latent_shape(pipeline))
        _probe(pipeline, density, blank, device)
    fresh_output_dir(folder, config.overwrite)

    latents = _sample(config, pipeline, prompts)
    clip, linear, held, losses, quality = _distil(config, pipeline, header, latents, device)
    file = distilled.write(folder, header, clip, linear)
    agreement = _agreement(pipeline, file, density, held, device) if density is not None else {}
    result = {
        "schema": SCHEMA,
        "model": config.model,
        "decoder": asdict(header),
        "sha256": sha256_file(file),
        "n": {"pictures": config.images, "held_out": config.held_out, "stages": config.stages},
        "seed": config.seed,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "loss": {"first": losses[0], "last": sum(losses[-50:]) / len(losses[-50:])},
        "psnr": quality,
        "agreement": agreement,
        "seconds": time.perf_counter() - begun,
        "provenance": provenance(),
    }
    write_json_atomic(folder / RESULT, result)
    print(f"{file}: {quality['clip']:.1f} dB on held-out x̂0 (linear: {quality['linear']:.1f} dB)")
    for name, row in agreement.items():
        print(_line(name, row))


def _prompts(config: DistillConfig) -> list[str]:
    """A prompt for every picture, held-out ones last."""
    from expunge import backbones
    from expunge.decoding.prompts import from_file, neutral

    n = config.images + config.held_out
    if config.prompts is None:
        return neutral(backbones.resolve(config.model), n, config.seed)
    given = from_file(config.prompts)
    return [given[i % len(given)] for i in range(n)]


def _header(config: DistillConfig, pipeline: Any) -> Header:
    from expunge import backbones
    from expunge.decoding.base import digests, latent_channels, vae_factor
    from expunge.decoding.distill import least_up
    from expunge.decoding.distilled import Header

    side = min(backbones.latent_shape(pipeline)[1:])
    factor = vae_factor(pipeline.vae)
    resolution = config.resolution or min(CLIP_PIXELS, side * factor)
    if not 1 <= resolution <= side * factor:
        raise UserError(
            f"got resolution {resolution}; allowed: 1 to {side * factor}, the model's own"
        )
    up = least_up(side, resolution, factor)
    pool = config.images * config.stages * 6 * (side * up) ** 2
    if pool > POOL_BYTES:
        raise UserError(
            f"got images {config.images} and stages {config.stages}, which need {pool >> 30} GiB; "
            f"allowed: {POOL_BYTES >> 30} GiB; lower images or resolution"
        )
    return Header(
        latent_channels=latent_channels(pipeline),
        scaling_factor=float(pipeline.vae.config.scaling_factor),
        vae_sha256=digests(pipeline.vae),
        up=up,
        resolution=side * up,
        width=config.width,
        depth=config.depth,
    )


def _sample(config: DistillConfig, pipeline: Any, prompts: list[str]) -> Tensor:
    """x̂0 (S, N, C, h, w) of all pictures."""
    from tqdm import tqdm

    from expunge.backbones import recommended_guidance
    from expunge.decoding.trajectories import predicted_x0

    scale = config.guidance_scale
    with tqdm(total=len(prompts), desc="sample", unit="image", disable=None) as bar:
        return predicted_x0(
            pipeline,
            prompts,
            [config.seed + i for i in range(len(prompts))],
            steps=config.sampling_steps,
            guidance_scale=recommended_guidance(config.model) if scale is None else scale,
            stages=config.stages,
            batch_size=config.batch_size,
            done=bar.update,
        )


def _distil(
    config: DistillConfig, pipeline: Any, header: Header, latents: Tensor, device: str
) -> tuple[Any, Any, Tensor, list[float], dict[str, Any]]:
    """Network, linear map, held-out x̂0 (S, n, …), losses, and PSNR in dB on the held-out ones."""
    from tqdm import tqdm

    from expunge.decoding import Vae, distill
    from expunge.decoding.base import Decoder

    exact = Vae().build(pipeline)
    learnt, held = latents[:, : config.images], latents[:, config.images :]

    def decode(part: Tensor) -> Pairs:
        flat = part.flatten(0, 1)
        with tqdm(total=len(flat), desc="decode", unit="image", disable=None) as bar:
            return distill.decode_pairs(exact, flat, header.up, device, bar.update)

    pairs, test = decode(learnt), decode(held)
    linear = distill.fit_linear(pairs)
    clip = distill.new_network(linear, header.up, header.width, header.depth, config.seed)
    with tqdm(total=config.steps, desc="learn", unit="step", disable=None) as bar:

        def done(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()

        losses = distill.learn(
            clip,
            pairs,
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=config.seed,
            device=device,
            done=done,
        )
    cheap = Decoder(clip, header.latent_channels, header.up)
    flat = Decoder(linear, header.latent_channels, 1)
    n = config.held_out
    quality = {
        "clip": distill.psnr(cheap, test.latents, test.pictures, device),
        "linear": distill.psnr(flat, test.latents, test.colours, device),
        "clip_stages": [
            distill.psnr(cheap, held[s], test.pictures[s * n : (s + 1) * n], device)
            for s in range(config.stages)
        ],
    }
    return clip, linear, held, losses, quality


def _probe(pipeline: Any, density: Any, latents: Tensor, device: str) -> None:
    from expunge.decoding import Vae
    from expunge.decoding.agreement import probe

    probe(Vae().build(pipeline), density, latents, device, 1)


def _agreement(
    pipeline: Any, file: Path, density: Any, held: Tensor, device: str
) -> dict[str, Any]:
    from expunge.decoding import Clip, Linear, Vae
    from expunge.decoding.agreement import report

    path = str(file)
    # Read back from the file: what is reported is what was written.
    decoders = {
        "vae": Vae().build(pipeline),
        "clip": Clip(path).build(pipeline),
        "linear": Linear(path).build(pipeline),
    }
    return report(decoders, density, held, device=device)


def _line(name: str, row: dict[str, Any]) -> str:
    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    return (
        f"{name}: rank correlation {shown(row['rank_correlation']['value'])}, gradient cosine "
        f"{shown(row['gradient_cosine']['value'])}, {row['flops'] / 1e9:.3f} GFLOP a decode"
    )
