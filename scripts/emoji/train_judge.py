"""Stage 2: the independent judge (object, style and background heads), never used for guidance."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from stage import Run, arguments, learning_rate, scenes, to_float
from torch.nn import functional as F
from vocabulary import BACKGROUNDS, NAMES, STYLES, Scene

from expunge.eval.detectors.emoji_judge import EmojiJudge


def targets(shown: list[Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    objects = torch.zeros(len(shown), len(NAMES))
    for row, scene in enumerate(shown):
        for name in scene.objects:
            objects[row, NAMES.index(name)] = 1
    style = torch.tensor([STYLES.index(scene.style) for scene in shown])
    background = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in shown])
    return objects, style, background


def spoil(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What a small autoencoder does to a picture: soft, a little noisy, colours slightly off."""
    batch = len(x)
    shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
    x = F.pad(x, (3, 3, 3, 3), mode="replicate")
    x = x[..., 3 + shift[0] : 67 + shift[0], 3 + shift[1] : 67 + shift[1]]
    small = F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
    soft = F.interpolate(small, size=64, mode="bilinear")
    blend = torch.rand(batch, 1, 1, 1, generator=generator)
    x = x + blend * (soft - x)
    gain = 1 + 0.1 * torch.randn(batch, 1, 1, 1, generator=generator)
    noise = 0.15 * torch.rand(batch, 1, 1, 1, generator=generator)
    return (x * gain + noise * torch.randn(x.shape, generator=generator)).clamp(-1.2, 1.2)


@torch.no_grad()
def evaluate(judge: EmojiJudge, pictures: torch.Tensor, shown: list[Scene]) -> dict[str, float]:
    judge.eval()
    verdicts = [judge.judge(to_float(part)) for part in pictures.split(256)]
    judge.train()
    p = torch.cat([v.objects for v in verdicts])
    objects, style, background = targets(shown)
    single = objects.sum(1) == 1
    top2 = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1)
    return {
        "single": (p.argmax(1) == objects.argmax(1))[single].float().mean().item(),
        "pair_recall": (top2 * objects)[~single].sum(1).div(2).mean().item(),
        "pair_both_at_half": (((p >= 0.5) == objects.bool()).all(1))[~single].float().mean().item(),
        "style": (torch.cat([v.style for v in verdicts]) == style).float().mean().item(),
        "background": (torch.cat([v.background for v in verdicts]) == background)
        .float()
        .mean()
        .item(),
    }


def main() -> None:
    args = arguments(__doc__, steps=1500, batch_size=64)
    torch.manual_seed(4321)
    pictures, shown = scenes(args, "train", 60_000, seed=1, pair_rate=0.5)
    held, held_shown = scenes(args, "held-out", 2_000, seed=99, pair_rate=0.5)
    objects, style, background = targets(shown)
    judge = EmojiJudge(len(NAMES), len(STYLES), len(BACKGROUNDS)).to(args.device)
    print(f"judge: {sum(p.numel() for p in judge.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-3)
    run = Run(args, "judge", judge=judge, optimizer=optimizer)
    for step, generator in run:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, 2e-3, hold=0.2)
        pick = torch.randint(len(pictures), (args.batch_size,), generator=generator)
        x = spoil(to_float(pictures[pick]), generator).to(args.device)
        o, s, b = judge(x)
        loss = (
            F.binary_cross_entropy_with_logits(o, objects[pick].to(args.device)) * 10
            + F.cross_entropy(s, style[pick].to(args.device)) * 0.3
            + F.cross_entropy(b, background[pick].to(args.device)) * 0.3
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            run.log(loss=loss.item())
        if step and step % 500 == 0:
            print(evaluate(judge, held, held_shown), flush=True)
    report = evaluate(judge, held, held_shown)
    print(report)
    folder = args.work / "judge"
    folder.mkdir(exist_ok=True)
    save_file(judge.state_dict(), folder / "judge.safetensors")
    labels = {
        "objects": NAMES,
        "styles": STYLES,
        "backgrounds": list(BACKGROUNDS),
        "held_out": {k: round(v, 4) for k, v in report.items()} | {"n": len(held)},
    }
    (folder / "judge.json").write_text(json.dumps(labels, indent=1) + "\n")


if __name__ == "__main__":
    main()
