"""One threshold for many concepts: raw cosines against percentiles, on scenes that are known.

`--kinds text images` has every concept twice, in words and as 24 example pictures; several `--clip`
have it in each of them. Pictures without any harmful object make the reference; other pictures are
judged. `any`: is a harmful object in the picture, said by the largest score of all concepts.
`each`: at the threshold that one harmless picture in a hundred reaches over all concepts together,
how often each concept fires on harmless pictures, and how often it finds its own object. `--noise`
shows the guide what an early x̂0 is like; each level has a table, and an ROC curve of `any` in
`--plot`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from stage import scenes, to_float
from torch import Tensor
from vocabulary import CATEGORIES, HARMFUL, article

from expunge.densities.base import HarmDensity
from expunge.densities.calibrated import Percentile
from expunge.densities.clip_images import ClipImages
from expunge.densities.clip_text import ClipText
from expunge.densities.combination import Combined
from expunge.densities.head_training import auc
from expunge.densities.reference import Reference
from expunge.results import write_json_atomic

matplotlib.use("agg")
from matplotlib import pyplot as plt

NAMES = [name for category in HARMFUL for name in CATEGORIES[category]]
EXAMPLES = 24


def density(args: argparse.Namespace, kind: str, clip: str) -> HarmDensity:
    """All concepts in words, or each by example pictures of it alone."""
    if kind == "text":
        return ClipText(clip=clip, targets=[article(name) for name in NAMES]).build()
    pictures, shown = scenes(args, "filter", 6_000, seed=7, pair_rate=0.5)
    parts = []
    for name in NAMES:
        folder = args.work / "examples" / name
        folder.mkdir(parents=True, exist_ok=True)
        alone = [i for i, scene in enumerate(shown) if set(scene.objects) == {name}]
        for i in alone[:EXAMPLES]:
            Image.fromarray(pictures[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        parts.append(ClipImages(str(folder), clip=clip, name=article(name)).build())
    return Combined(parts)


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
    parser.add_argument("--clip", nargs="+", default=["emoji"])
    parser.add_argument("--kinds", nargs="+", choices=["text", "images"], default=["text"])
    parser.add_argument(
        "--noise", type=float, nargs="+", default=[0.0], help="added to reference and test"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a JSON file of the figures")
    parser.add_argument("--plot", type=Path, help="a PNG of the ROC curves")
    args = parser.parse_args()
    args.cache = args.cache or args.work / "icons"
    torch.set_num_threads(args.threads)
    pictures, shown = scenes(args, "held-out", 2_000, seed=99, pair_rate=0.5)
    raw = Combined([density(args, kind, clip) for kind in args.kinds for clip in args.clip])
    holds = torch.tensor([[name in scene.objects for name in NAMES] for scene in shown])
    holds = holds.repeat(1, len(args.kinds) * len(args.clip))
    harmless = ~holds.any(1)
    # The first half of the harmless pictures is the reference, and judged no more.
    known = harmless & (harmless.cumsum(0) <= harmless.sum() // 2)
    clean = torch.cat([to_float(part) for part in pictures.split(100)])
    results, curves = {}, {}
    for σ in args.noise:
        noise = σ * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        found = scales(raw, (clean + noise).clamp(-1, 1), known)
        results[σ] = {name: figures(scores, holds[~known]) for name, scores in found.items()}
        curves[σ] = {name: roc(scores.amax(1), ~harmless[~known]) for name, scores in found.items()}
        columns = list(results[σ]["raw"])
        head = f"{len(raw.names)} concepts, noise {σ:g}, reference {int(known.sum())}"
        print(f"| {head} | {' | '.join(columns)} |\n" + "|---" * (len(columns) + 1) + "|")
        for name, row in results[σ].items():
            print(f"| {name} | {' | '.join(f'{row[column]:.3f}' for column in columns)} |")
    if args.output:
        write_json_atomic(args.output, {"n": int((~known).sum()), "figures": results})
    if args.plot:
        plot(curves, args.plot)


def scales(raw: HarmDensity, seen: Tensor, known: Tensor) -> dict[str, Tensor]:
    """Scores (N, M) of the pictures that are not the reference, on every scale."""
    table = torch.cat([raw(part).per_concept for part in seen.split(100)])
    reference = Reference(raw.names, table[known].T.sort(dim=1).values.tolist())
    found = {"raw": table[~known]}
    for name, pooled in (("calibrated, concept", False), ("calibrated, pooled", True)):
        scale = Percentile(raw, reference, raw.thresholds.clone().fill_(0.9), pooled=pooled)
        found[name] = torch.cat([scale(part).per_concept for part in seen[~known].split(100)])
    return found


def roc(scores: Tensor, harmful: Tensor) -> tuple[Tensor, Tensor]:
    """Share of harmless and of harmful pictures above each threshold."""
    order = harmful[scores.argsort(descending=True)]
    false, true = ((part.cumsum(0) / part.sum()) for part in (~order, order))
    return false, true


def plot(curves: dict[float, dict[str, tuple[Tensor, Tensor]]], file: Path) -> None:
    figure, sides = plt.subplots(1, len(curves), figsize=(3.6 * len(curves), 3.4), squeeze=False)
    for side, (σ, lines) in zip(sides[0], curves.items(), strict=True):
        for name, (false, true) in lines.items():
            side.plot(false, true, label=name)
        side.set(xscale="log", xlim=(1e-3, 1), ylim=(0, 1.02), title=f"noise {σ:g}")
        side.set_xlabel("harmless pictures that fire")
    sides[0, 0].set_ylabel("harmful pictures found")
    sides[0, -1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
