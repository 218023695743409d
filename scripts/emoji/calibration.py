"""One threshold for many concepts: raw cosines against percentiles, on scenes that are known.

Pictures without any harmful object make the reference; other pictures are judged. `any`: is a
harmful object in the picture, said by the largest score of all concepts. `each`: at the threshold
that one harmless picture in a hundred reaches over all concepts together, how often each concept
fires on harmless pictures, and how often it finds its own object. On clean scenes the guide makes
no mistake on any scale; `--noise` shows it what an early x̂0 is like.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from stage import scenes, to_float
from torch import Tensor
from vocabulary import CATEGORIES, HARMFUL, article

from expunge.densities.calibrated import Percentile
from expunge.densities.clip_text import ClipText
from expunge.densities.head_training import auc
from expunge.densities.reference import Reference
from expunge.results import write_json_atomic


def figures(scores: Tensor, holds: Tensor) -> dict[str, float]:
    """What scores (N, M) of pictures say of which concepts they hold (N, M)."""
    harmful = holds.any(1)
    harmless = scores[~harmful]
    η = harmless.amax(1).quantile(0.99)
    false = (harmless >= η).float().mean(0)
    found = torch.stack([(scores[holds[:, c], c] >= η).float().mean() for c in range(len(false))])
    return {
        "any AUC": auc(scores.amax(1), harmful),
        "any found at 1 % false": (scores.amax(1) >= η)[harmful].float().mean().item(),
        "each false, most": false.max().item(),
        "each found, mean": found.mean().item(),
        "each found, least": found.min().item(),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="as for build.sh")
    parser.add_argument("--cache", type=Path, help="icon packages (default: WORK/icons)")
    parser.add_argument("--clip", default="emoji")
    parser.add_argument("--noise", type=float, default=0.0, help="added to reference and test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a JSON file of the figures")
    args = parser.parse_args()
    args.cache = args.cache or args.work / "icons"
    torch.set_num_threads(args.threads)
    pictures, shown = scenes(args, "held-out", 2_000, seed=99, pair_rate=0.5)
    names = [name for category in HARMFUL for name in CATEGORIES[category]]
    holds = torch.tensor([[name in scene.objects for name in names] for scene in shown])
    raw = ClipText(clip=args.clip, targets=[article(name) for name in names]).build()
    generator = torch.Generator().manual_seed(0)
    shape = (len(pictures), 3, *pictures.shape[-2:])
    noise = args.noise * torch.randn(shape, generator=generator)
    seen = (torch.cat([to_float(part) for part in pictures.split(100)]) + noise).clamp(-1, 1)
    table = torch.cat([raw(part).per_concept for part in seen.split(100)])
    harmless = ~holds.any(1)
    # The first half of the harmless pictures is the reference, and judged no more.
    known = harmless & (harmless.cumsum(0) <= harmless.sum() // 2)
    reference = Reference(raw.names, table[known].T.sort(dim=1).values.tolist())
    results = {"raw": figures(table[~known], holds[~known])}
    for name, pooled in (("calibrated, concept", False), ("calibrated, pooled", True)):
        scale = Percentile(raw, reference, raw.thresholds.clone().fill_(0.9), pooled=pooled)
        scores = torch.cat([scale(part).per_concept for part in seen[~known].split(100)])
        results[name] = figures(scores, holds[~known])
    columns = list(results["raw"])
    print(f"| {len(names)} concepts, reference {int(known.sum())} | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in results.items():
        print(f"| {name} | {' | '.join(f'{row[column]:.3f}' for column in columns)} |")
    if args.output:
        write_json_atomic(args.output, {"n": int((~known).sum()), "figures": results})


if __name__ == "__main__":
    main()
