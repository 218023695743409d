"""What the guard costs: ratios to plain sampling, run in turn in one process.

    python scripts/bench/sampling.py [--rounds 5] [--pictures 16] [--threads 2]

Prints a table and, last, one line of JSON. `benign` are prompts on which the guard must never act,
`fired` such on which it always does. The published code takes the gradient at every step, whatever
it sees, and so does its row here. Seconds of one machine mean little: only ratios of neighbours in
time are kept, and the median of those. For SD 1.5, whose weights no test machine has,
floating-point operations of networks of its size are counted instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from expunge.backbones import load_pipeline, recommended_guidance
from expunge.concepts import Concept
from expunge.decoding.distilled import ClipNetwork
from expunge.densities.clip_text import ClipText
from expunge.generation import generate
from expunge.results import provenance
from expunge.sampling.samplers import SAMPLERS

BENIGN = ["a cat face", "a pizza in ink style", "a bus and a key", "a sunflower"]
FIRING = ["a bomb", "a bomb in ink style", "a cat face and a bomb", "a bomb and a key"]
STEPS = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipeline, concept = load_pipeline("emoji"), Concept(targets=["a bomb"])
    every_step = ClipText(top_k=1, threshold=-1.0)
    samplers = {
        name: SAMPLERS.load(name)(**more).wrap(pipeline, concept)
        for name, more in (("plain", {}), ("safe", {}), ("published", {"density": every_step}))
    }

    def seconds(name: str, prompts: list[str]) -> float:
        n = args.pictures
        begun = time.perf_counter()
        generate(
            samplers[name], (prompts * n)[:n], range(n), steps=STEPS,
            guidance_scale=recommended_guidance("emoji"), batch_size=n,
        )  # fmt: skip
        taken = time.perf_counter() - begun
        if name == "safe":
            fired = [any(step.fired[i] for step in samplers[name].trace.steps) for i in range(n)]
            assert fired == [prompts is FIRING] * n, f"{prompts}: fired {fired}"
        return taken

    for name in samplers:
        seconds(name, FIRING)  # warm
    ratios: dict[str, list[float]] = {"benign": [], "fired": [], "published": []}
    for _ in range(args.rounds):
        plain = seconds("plain", BENIGN)
        ratios["benign"].append(seconds("safe", BENIGN) / plain)
        plain = seconds("plain", FIRING)
        ratios["fired"].append(seconds("safe", FIRING) / plain)
        ratios["published"].append(seconds("published", FIRING) / plain)
    work = counted(lambda: seconds("safe", FIRING), samplers["safe"], args.pictures)
    trace = samplers["safe"].trace
    for name, values in ratios.items():
        print(
            f"{name:10} {statistics.median(values):.3f}  ({min(values):.3f} to {max(values):.3f})"
        )
    result = {f"{name}_ratio": round(statistics.median(v), 3) for name, v in ratios.items()}
    looks = sum(not all(map(_nan, step.score)) for step in trace.steps)
    result |= {"rounds": args.rounds, "pictures": args.pictures, "steps": STEPS, "looks": looks}
    result |= {"fired_work": work, "sd15": sd15(looks, work), "threads": args.threads}
    print(json.dumps(result | {"machine": provenance()["platform"]}))


def _nan(x: float) -> bool:
    return x != x


def counted(run, guarded, pictures: int) -> dict[str, float]:
    """What a run does a picture: branches of the UNet beyond the pairs, looks of the CLIP."""
    rows = {"branches": 0, "looks": 0}

    def count(name):
        def hook(module, args) -> None:
            rows[name] += len(args[0])

        return hook

    ((eye, _),) = guarded._guard.density.guides
    handles = [
        module.register_forward_pre_hook(count(name))
        for name, module in (("branches", guarded.unet.conv_in), ("looks", eye.model.visual))
    ]
    run()
    for handle in handles:
        handle.remove()
    rows["branches"] -= 2 * STEPS * pictures
    return {name: round(n / pictures, 2) for name, n in rows.items()}


def sd15(looks: int, work: dict[str, float]) -> dict[str, float]:
    """Ratios by counted operations, at SD 1.5's size: a UNet pair is a plain step.

    Args:
        looks: At a picture on which nothing fires.
        work: Of one that fires, as counted on the bundled model.
    """
    import open_clip
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        clip = open_clip.create_model("ViT-B-16", device="meta")
        decoder = ClipNetwork(channels=4, up=4, width=48, depth=3)
        x, c = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768)
        pixels = torch.empty(1, 3, 224, 224)
        t = torch.zeros(1)

        def flops(run, backward: bool = False) -> int:
            with FlopCounterMode(display=False) as counter:
                out = run()
                if backward:
                    out.sum().backward()
            return counter.get_total_flops()

        with torch.no_grad():
            branch = flops(lambda: unet(x, t, c).sample)
            decode = flops(lambda: vae.decode(x).sample)
            eye, cheap = flops(lambda: clip.encode_image(pixels)), flops(lambda: decoder(x))
        for part in (vae, clip):
            part.requires_grad_(False)
        z, p = x.clone().requires_grad_(), pixels.clone().requires_grad_()
        both = flops(lambda: vae.decode(z).sample, True) + flops(lambda: clip.encode_image(p), True)
    plain = 2 * branch * STEPS
    gate = looks * (eye + cheap)
    # What is covered for a map is not decoded anew; that it was is an upper bound.
    fired = work["branches"] * branch + work["looks"] * (eye + cheap)
    return {
        "tflop_unet_pair": round(2 * branch / 1e12, 3),
        "tflop_vae_decode": round(decode / 1e12, 3),
        "tflop_look": round((eye + cheap) / 1e12, 4),
        "benign_ratio": round(1 + gate / plain, 3),
        "fired_ratio": round(1 + fired / plain, 3),
        "published_ratio": round(1 + both / (2 * branch), 3),
    }


if __name__ == "__main__":
    main()
