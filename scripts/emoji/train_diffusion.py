"""Stage 4: the UNet and its text encoder, trained jointly on latents (ε-prediction).

One process or several: `torchrun --nproc_per_node 2 train_diffusion.py …`. On a CPU two
processes of one thread each beat one process of two threads by half.
"""

from __future__ import annotations

import random

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DDPCommunicationHookType
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from stage import Run, arguments, learning_rate, scenes, to_float
from tokenizer import CONTEXT
from tokenizer import build as build_tokenizer
from torch import nn
from train_vae import build as build_vae
from transformers import CLIPTextConfig, CLIPTextModel
from vocabulary import Scene, caption

SCHEDULE = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)
OFFSET_NOISE = 0.15  # without it the initial noise decides the background (terminal SNR leak)
MIN_SNR = 5.0
EMPTY_RATE = 0.1


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=128,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class TextToNoise(nn.Module):
    """Text encoder and UNet as one module, so that data parallelism sees one backward."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents, timesteps, tokens):
        return self.unet(latents, timesteps, self.text_encoder(tokens)[0]).sample


@torch.no_grad()
def encode(args, accelerator: Accelerator, pictures: torch.Tensor) -> torch.Tensor:
    """Latents scaled to unit variance; every process encodes its share once, all read all."""
    vae = build_vae()
    vae.load_state_dict(torch.load(args.work / "vae.pt", map_location="cpu")["vae"])
    vae.eval().to(accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    file = args.work / f"latents-{rank}-of-{world}.pt"
    if not file.exists():
        parts = []
        for part in pictures[rank::world].split(64):
            with accelerator.autocast():
                parts.append(vae.encode(to_float(part).to(accelerator.device)).latent_dist.mean)
        torch.save(torch.cat(parts).float().cpu(), file)
    accelerator.wait_for_everyone()
    latents = torch.empty(len(pictures), 4, 16, 16)
    for other in range(world):
        latents[other::world] = torch.load(args.work / f"latents-{other}-of-{world}.pt")
    return latents


def draw_captions(shown: list[Scene], pick: torch.Tensor, generator: torch.Generator) -> list[str]:
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    return ["" if rng.random() < EMPTY_RATE else caption(shown[i], rng) for i in pick.tolist()]


def main() -> None:
    args = arguments(__doc__, steps=12_600, batch_size=32)
    accelerator = Accelerator(
        cpu=args.device == "cpu",
        mixed_precision="bf16",
        kwargs_handlers=[DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.BF16)],
    )
    with accelerator.local_main_process_first():
        pictures, shown = scenes(args, "train", 60_000, seed=1, pair_rate=0.5)
    latents = encode(args, accelerator, pictures)
    scale = 1 / latents.std().item()
    latents *= scale
    del pictures
    tokenizer_folder = args.work / "tokenizer"
    tokenizer_folder.mkdir(exist_ok=True)
    with accelerator.local_main_process_first():
        tokenizer = build_tokenizer(tokenizer_folder)
    torch.manual_seed(args.seed)
    model = TextToNoise(build_unet(), build_text_encoder(tokenizer))
    # Explicit products: the fused attention's backward is slow on a CPU at this size.
    model.unet.set_attn_processor(AttnProcessor())
    scheduler = DDPMScheduler(**SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3, betas=(0.9, 0.99))
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=3 / 4)
    run = Run(args, "diffusion", unet=model.unet, text_encoder=model.text_encoder,
              optimizer=optimizer, ema=ema)  # fmt: skip
    ema.to(accelerator.device)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    wrapped.train()
    rank, world, smooth = accelerator.process_index, accelerator.num_processes, None
    if rank:
        run.save = lambda: None
    for step, generator in run:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, 8e-4, warmup=200, hold=0.5)
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: B023, E731
        total = args.batch_size * world
        pick = torch.randint(len(latents), (total,), generator=generator)
        # Stratified in t: every batch sees all noise levels.
        t = (torch.arange(total) + torch.rand(total, generator=generator)) * (1000 / total)
        t = t.long()[torch.randperm(total, generator=generator)]
        noise = draw(total, 4, 16, 16) + OFFSET_NOISE * draw(total, 4, 1, 1)
        texts = draw_captions(shown, pick, generator)
        mine = slice(rank * args.batch_size, (rank + 1) * args.batch_size)
        tokens = tokenizer(
            texts[mine], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(accelerator.device)
        x0, t, noise = (
            v.to(accelerator.device) for v in (latents[pick[mine]], t[mine], noise[mine])
        )
        with accelerator.autocast():
            predicted = wrapped(scheduler.add_noise(x0, noise, t), t, tokens)
        snr = compute_snr(scheduler, t)
        weight = snr.clamp(max=MIN_SNR) / snr
        loss = (weight * (predicted.float() - noise).square().mean((1, 2, 3))).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0 and rank == 0:
            run.log(loss=smooth, scale=scale)


if __name__ == "__main__":
    main()
