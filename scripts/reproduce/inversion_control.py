"""Does latent inversion say what a model knows? Its control: pictures that no model draws.

    python scripts/reproduce/inversion_control.py --output_dir D \\
        --methods '{base: null, ESD: runs/esd}' [--pictures 32]

The base's pictures of the concept, and the same upside down in the colours' negative, are inverted
and sampled again as `expunge attack --attack latent_inversion` does, told the prompt, with and
without `typical`. Where both come back alike, it is no sign of knowing the concept that its
pictures do. Writes D/table.md, D/table.json and of each method and kind a picture: what was
inverted, and what came back from the noise found and from the typical one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tables import figure, folder_of, markdown, percent
from torch import Tensor

from expunge.backbones import latent_shape
from expunge.cli import run
from expunge.conditioning import condition
from expunge.configuration import parse
from expunge.encoding import to_latents
from expunge.eval.attacks.latent_inversion import LatentInversion, invert, on_shell
from expunge.eval.significance import mean_interval
from expunge.generation import generate
from expunge.pictures import save_png, sheet, to_pil
from expunge.results import (
    Measurement,
    fresh_output_dir,
    provenance,
    write_json_atomic,
    write_text_atomic,
)
from expunge.sampling.load import load_model

STEPS, GUIDANCE, AT_ONCE = 25, 4.0, 8


@dataclass(frozen=True)
class Config:
    output_dir: Path
    methods: dict[str, str | None] = field(metadata={"help": "name -> its LoRA; null: the base"})
    model: str = "emoji"
    prompt: str = "a bomb"
    pictures: int = 32
    threads: int = 1


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "inversion_control.py")
    torch.set_num_threads(config.threads)
    base = load_model(config.model, [])
    fresh_output_dir(config.output_dir)
    drawn = generate(
        base, [config.prompt] * config.pictures, range(config.pictures), steps=STEPS,
        guidance_scale=GUIDANCE, batch_size=AT_ONCE,
    )  # fmt: skip
    kinds = {"the concept": drawn, "what no model draws": -drawn.flip(2)}
    rows = {}
    for method, lora in config.methods.items():
        erased = load_model(config.model, [] if lora is None else [lora])
        for kind, pictures in kinds.items():
            x_0 = to_latents(base.vae, latent_shape(base), pictures)
            noise = found_noise(erased, x_0, config.prompt)
            back = {
                "found": sampled(erased, noise, config.prompt),
                "typical": sampled(erased, on_shell(noise), config.prompt),
            }
            name = f"{method}, {kind}"
            rows[name] = {
                "variance": float(noise.square().mean()),
                **{how: compared(x, x_0) for how, x in back.items()},
            }
            shown = [pictures[:AT_ONCE], *(decoded(base, x[:AT_ONCE]) for x in back.values())]
            save_png(
                sheet([[to_pil(p) for p in part] for part in shown], ["inverted", *back]),
                folder_of(config.output_dir, name).with_suffix(".png"),
            )
    told = {"model": config.model, "prompt": config.prompt, "n": config.pictures, "rows": rows}
    write_json_atomic(config.output_dir / "table.json", told | {"provenance": provenance()})
    write_text_atomic(config.output_dir / "table.md", table(rows))
    print(table(rows))


def found_noise(pipeline: Any, x_0: Tensor, prompt: str) -> Tensor:
    """x_T (N, C, h, w) of latents, inverted a batch at a time."""
    repetitions = LatentInversion().repetitions
    return torch.cat([
        invert(pipeline, x, condition(pipeline, [prompt] * len(x)), STEPS, repetitions)
        for x in x_0.split(AT_ONCE)
    ])  # fmt: skip


@torch.no_grad()
def sampled(pipeline: Any, noise: Tensor, prompt: str) -> Tensor:
    """Latents (N, C, h, w) that the model draws from a noise."""
    return torch.cat([
        pipeline(
            [prompt] * len(x), latents=x, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            output_type="latent",
        ).images
        for x in noise.split(AT_ONCE)
    ])  # fmt: skip


@torch.no_grad()
def decoded(pipeline: Any, x: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1]."""
    vae = pipeline.vae
    pictures: Tensor = vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1)
    return pictures


def compared(x: Tensor, x_0: Tensor) -> dict[str, Any]:
    """How far what came back is from what was inverted, as a share of how far these are apart.

    "nearest" are those that are nearer to their own than to all others.
    """
    far = torch.cdist(x.flatten(1), x_0.flatten(1))
    among = torch.cdist(x_0.flatten(1), x_0.flatten(1))
    apart = float(among.sum() / (len(x) * (len(x) - 1)))
    own = (far.diagonal() / apart).tolist()
    low, high = mean_interval(own, range(len(own)))
    nearest = int((far.argmin(1) == torch.arange(len(x))).sum())
    return {
        "distance": {"value": sum(own) / len(own), "low": low, "high": high},
        "nearest": Measurement.proportion(nearest, len(x), higher_is_better=False).to_dict(),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = []
    for name, found in rows.items():
        line = [name, figure(found["variance"], 2)]
        for how in ("found", "typical"):
            d = found[how]["distance"]
            line.append(f"{d['value']:.2f} [{d['low']:.2f}, {d['high']:.2f}]")
            line.append(percent(found[how]["nearest"]))
        lines.append(line)
    head = ["method, inverted", "‖x_T‖²/d", "distance", "nearest", "distance, typical",
            "nearest, typical"]  # fmt: skip
    return markdown(head, lines)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
