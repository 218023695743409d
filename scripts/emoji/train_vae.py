"""Stage 1: the autoencoder (AutoencoderKL, f = 4, 4 channels)."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from stage import Run, arguments, learning_rate, scenes, to_float
from torch.nn import functional as F


def build() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def main() -> None:
    args = arguments(__doc__, steps=2400, batch_size=16)
    pictures, _ = scenes(args, "train", 60_000, seed=1, pair_rate=0.5)
    vae = build().to(args.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.0, weight_decay=1e-4, betas=(0.9, 0.99))
    run = Run(args, "vae", vae=vae, optimizer=optimizer)
    for step, generator in run:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, 2e-3)
        pick = torch.randint(len(pictures), (args.batch_size,), generator=generator)
        x = to_float(pictures[pick]).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(args.device)
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        y = y.float()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        sharp = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * sharp + 2e-3 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            psnr = 10 * torch.log10(4 / F.mse_loss(y, x)).item()
            run.log(loss=loss.item(), kl=kl.item(), psnr=psnr)


if __name__ == "__main__":
    main()
