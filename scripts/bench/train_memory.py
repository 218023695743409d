"""What a training step costs at the size of SD 1.5 and SDXL, with random weights.

    python scripts/bench/train_memory.py [--steps 5]

Counted on every machine: floating-point operations of a step of each shipped recipe, on the meta
device, in forwards of the UNet for one sample; and bytes of weights, gradients and optimiser,
without activations. Measured where there is a GPU: seconds and peak memory of a step. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from expunge import adapters, backbones
from expunge.conditioning import Conditioning
from expunge.configuration import parse
from expunge.results import provenance
from expunge.train import footprint
from expunge.train.config import TrainConfig
from expunge.train.latents import Replay
from expunge.train.predictions import Inputs, Networks

UNETS = Path(__file__).parent / "unets"
RECIPES = ("esd_published", "sdd_published", "esd", "sdd", "density")
RANK = 8
TOKENS, POOLED = 77, 1280


@dataclass(frozen=True)
class Setup:
    """A run whose memory is told: batch 4 at 512 px, or 1 at 1024."""

    unet: str
    batch: int
    base_precision: str = "bf16"
    optimizer: str = "adamw"
    checkpointing: bool = False
    limit_gib: float = 8.0


SETUPS = (
    Setup("sd15", 4, "fp32", limit_gib=math.inf),
    Setup("sd15", 4),
    Setup("sd15", 4, "nf4", "adamw8bit", checkpointing=True, limit_gib=5.0),
    Setup("sdxl", 1, checkpointing=True, limit_gib=16.0),
)


def main() -> None:
    logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each setup")
    args = parser.parse_args()
    found: dict[str, Any] = {"counted_step": {}, "counted_bytes": [], "measured": []}
    for name in ("sd15", "sdxl"):
        forward, student = flops(name)
        print(f"{name}, counted: a forward is {forward / 1e12:.2f} TFLOP, the student's with its "
              f"backward {student / forward:.2f} forwards")  # fmt: skip
        costs = {recipe: step_cost(recipe, student / forward) for recipe in RECIPES}
        for recipe, cost in costs.items():
            parts = ", ".join(f"{k} {cost[k]:.0f}" for k in ("sampling", "teacher", "student"))
            print(f"  {recipe:14} {cost['per_sample']:6.1f} forwards a sample; of a step: {parts}")
        found["counted_step"][name] = {"tflop_forward": round(forward / 1e12, 3), **costs}
    for setup in SETUPS:
        row = vars(setup) | {"gib": round(weight_bytes(setup) / 2**30, 2)}
        print(f"{row['gib']:6.2f} GiB counted, without activations: {setup}")
        found["counted_bytes"].append(row)
    if torch.cuda.is_available():
        for setup in SETUPS:
            seconds, peak = measure(build(setup, "cuda"), setup, args.steps)
            row = vars(setup) | {"seconds": round(seconds, 3), "peak_gib": round(peak / 2**30, 2)}
            print(f"{row['peak_gib']:6.2f} GiB and {seconds:.3f} s a step measured: {setup}")
            found["measured"].append(row)
    else:
        print("no GPU: nothing is measured; seconds and peak memory are unknown")
    for row in (*found["counted_bytes"], *found["measured"]):
        row["limit_gib"] = None if row["limit_gib"] == math.inf else row["limit_gib"]
    print(json.dumps(found | {"provenance": provenance()}))


def flops(name: str) -> tuple[int, int]:
    """Operations of one sample: the frozen base forwards, the student forwards and backwards."""
    networks = build(Setup(name, 1, "fp32"), "meta")
    inputs = inputs_for(networks.unet, 1)

    def count(network: str) -> int:
        with FlopCounterMode(display=False) as counter:
            found = networks.raw(network, inputs)
            if network == "student":
                found.sum().backward()
        return counter.get_total_flops()

    return count("teacher"), count("student")


def step_cost(recipe: str, student: float) -> dict[str, float]:
    """Forwards that a step of a shipped recipe costs on average; one with gradient is `student`.

    Of `density`, each sample is taken to show the concept, which costs a pass more; the CLIP that
    looks is not counted.
    """
    argv = ["--config", f"train/emoji_bomb_{recipe}.yaml", "--output_dir", "x"]
    config = parse(TrainConfig, argv)
    n, m = config.batch_size, config.preserve.batch_size if config.preserve.weight else 0
    others = sum(not need.startswith("student/") for need in config.objective.needs)
    steps = config.latents.steps
    if isinstance(config.latents, Replay):
        batches = -(-config.latents.rollouts // (n + m))
        lasts = min(config.latents.refresh, config.steps)  # steps from one bank to the next
        sampling = batches * (n + m) * 2 * steps / lasts
    else:
        sampling = (n + m) * 2 * (steps / 2)  # the mean of k ~ U{1 … steps − 1} is steps / 2
    cost = {"sampling": sampling, "teacher": n * others + m, "student": (n + m) * student}
    cost["per_sample"] = sum(cost.values()) / (n + m)
    return {part: round(value, 2) for part, value in cost.items()}


def weight_bytes(setup: Setup) -> float:
    """Weights, gradients and optimiser; text encoder and VAE are on the CPU (`offload`)."""
    networks = build(Setup(setup.unet, 1, "fp32"), "meta")
    learnt = sum(p.numel() for p in networks.parameters)
    total = sum(p.numel() for p in networks.unet.parameters()) - learnt
    small = 0
    if setup.base_precision == "nf4":  # 4 bits and a float32 for 64 weights
        small = sum(m.weight.numel() for m in networks.unet.modules() if type(m) is nn.Linear)
        small -= learnt  # PEFT's are linear layers too
    width = footprint.DTYPES[setup.base_precision].itemsize
    moments = 2 if setup.optimizer == "adamw8bit" else 8
    return (total - small) * width + small * (0.5 + 4 / 64) + learnt * (4 + 4 + moments)


def build(setup: Setup, device: str) -> Networks:
    """A UNet with random weights and a LoRA on its cross-attention, as training has it."""
    settings = json.loads((UNETS / f"{setup.unet}.json").read_text())
    if setup.base_precision == "nf4":
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        with tempfile.TemporaryDirectory() as folder:
            UNet2DConditionModel(**settings).save_pretrained(folder)
            unet = UNet2DConditionModel.from_pretrained(
                folder, quantization_config=how, torch_dtype=torch.bfloat16
            )
    else:
        with torch.device(device):
            unet = UNet2DConditionModel(**settings).to(footprint.DTYPES[setup.base_precision])
    if setup.checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    names = backbones.modules_of(unet, "x")
    with torch.device(device):
        parameters = adapters.attach(unet, names, RANK, RANK, seed=0)
    return Networks(unet, unet, DDIMScheduler(), None, parameters)


def inputs_for(unet: Any, batch: int) -> Inputs:
    """Of the UNet's own picture size."""
    device, side = unet.conv_in.weight.device, unet.config.sample_size
    conditioning = Conditioning(torch.randn(batch, TOKENS, unet.config.cross_attention_dim))
    if unet.config.addition_embed_type:
        conditioning = Conditioning(
            conditioning.states, torch.randn(batch, POOLED), torch.full((batch, 6), 8.0 * side)
        )
    x_t, t = torch.randn(batch, 4, side, side), torch.full((batch,), 500)
    return Inputs(x_t.to(device), t.to(device), conditioning.to(device))


def measure(networks: Networks, setup: Setup, steps: int) -> tuple[float, int]:
    """Seconds of a step of ESD on given x_t, the median, and the most memory that it takes."""
    from expunge.train.objectives.esd import Esd

    device, objective = networks.unet.conv_in.weight.device, Esd()
    config = parse(TrainConfig, ["--output_dir", "x", "--concept.targets", "[a bomb]",
                                 "--optimizer", setup.optimizer])  # fmt: skip
    optimizer = footprint.optimizer(config, networks.parameters)
    inputs = inputs_for(networks.unet, setup.batch)
    seconds = []
    for i in range(steps + 1):
        if device.type == "cuda" and i == 1:  # the first one allocates and tunes
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        objective.loss(networks.predict(dict.fromkeys(objective.needs, inputs))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return sorted(seconds[1:])[steps // 2], peak


if __name__ == "__main__":
    main()
