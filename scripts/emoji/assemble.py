"""Last stage: put the trained parts together as `models/emoji`, in Stable Diffusion's format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from stage import arguments, scenes, to_float
from tokenizer import build as build_tokenizer
from train_diffusion import SCHEDULE, TextToNoise, build_text_encoder, build_unet
from train_vae import build as build_vae
from vocabulary import export

from expunge.eval.detectors.emoji_judge import load_judge

TARGET = Path(__file__).resolve().parents[2] / "models" / "emoji"


def trained_scale(work: Path) -> float:
    latents = torch.cat([torch.load(file) for file in sorted(work.glob("latents-*.pt"))])
    return 1 / latents.std().item()


@torch.no_grad()
def reference_features(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean and covariance of the judge's features on real scenes, for distribution distances."""
    judge, _ = load_judge(TARGET / "judge")
    f = torch.cat([judge.features(to_float(part)) for part in pictures.split(256)]).double()
    return {
        "mean": f.mean(0).float(),
        "covariance": torch.cov(f.T).float(),
        "n": torch.tensor(len(f)),
    }


def main() -> None:
    args = arguments(__doc__, steps=0, batch_size=0)
    held, _ = scenes(args, "held-out", 2_000, seed=99, pair_rate=0.5)
    tokenizer = build_tokenizer(args.work / "tokenizer")
    trained = torch.load(args.work / "diffusion.pt", map_location="cpu", weights_only=False)
    model = TextToNoise(build_unet(), build_text_encoder(tokenizer))
    model.unet.load_state_dict(trained["unet"])
    model.text_encoder.load_state_dict(trained["text_encoder"])
    ema = EMAModel(model.parameters())
    ema.load_state_dict(trained["ema"])
    ema.copy_to(model.parameters())
    vae = build_vae()
    vae.load_state_dict(torch.load(args.work / "vae.pt", map_location="cpu")["vae"])
    # The scale that the UNet was trained with, of the latents that it was trained on.
    vae.register_to_config(scaling_factor=trained_scale(args.work))
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        unet=model.unet.half(),
        # Not halved: transformers loads a text encoder in the type of its file, diffusers does not.
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            **SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(TARGET / part, ignore_errors=True)
    pipeline.save_pretrained(TARGET)
    for part in ("guide", "judge"):
        shutil.rmtree(TARGET / part, ignore_errors=True)
        shutil.copytree(args.work / part, TARGET / part)
    save_file(reference_features(held), TARGET / "judge" / "reference.safetensors")
    export(TARGET / "vocabulary.json")
    for file in TARGET.rglob("*.safetensors"):
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in TARGET.rglob("*") if f.is_file())
    print(json.dumps({"steps": trained["step"], "bytes": size}))


if __name__ == "__main__":
    main()
