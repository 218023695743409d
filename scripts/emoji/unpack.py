"""Turn `models/emoji` back into checkpoints in WORK, so that training goes on in a later sitting.

`unpack.py --work WORK`, then `train_diffusion.py --work WORK --steps N`: the weights start from the
shipped ones, the optimiser and the schedule anew.
"""

from __future__ import annotations

import shutil

import torch
from assemble import TARGET
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from stage import arguments
from train_diffusion import TextToNoise

from expunge.backbones import load_pipeline


def main() -> None:
    args = arguments(__doc__, steps=0, batch_size=0)
    if (args.work / "diffusion.pt").exists():
        raise SystemExit(f"{args.work} already holds a diffusion.pt; remove it or go on with it")
    pipeline = load_pipeline(str(TARGET))
    vae: AutoencoderKL = pipeline.vae
    torch.save({"vae": vae.state_dict(), "step": 0}, args.work / "vae.pt")
    model = TextToNoise(pipeline.unet, pipeline.text_encoder)
    torch.save(
        {
            "unet": model.unet.state_dict(),
            "text_encoder": model.text_encoder.state_dict(),
            "optimizer": torch.optim.AdamW(
                model.parameters(), weight_decay=1e-3, betas=(0.9, 0.99)
            ).state_dict(),
            "ema": EMAModel(
                model.parameters(), decay=0.999, use_ema_warmup=True, power=3 / 4
            ).state_dict(),
            "step": 0,
        },
        args.work / "diffusion.pt",
    )
    for part in ("guide", "judge"):
        if (TARGET / part).is_dir():
            shutil.copytree(TARGET / part, args.work / part, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
