"""Stage 3: the CLIP that guides (open_clip), trained on what a sampler shows it.

Sigmoid loss over pictures × captions with the full truth table: whether a caption holds for a
picture is known for every pair of the batch, so there are no false negatives, and a caption may
name only one of two objects. Pictures are clean, noisy, blurred or washed out like a half-denoised
prediction of the clean image; a guide that only knows clean pictures has adversarial gradients.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass

import open_clip
import torch
from safetensors.torch import save_file
from stage import Run, arguments, learning_rate, scenes, to_float
from tokenizer import CONTEXT
from tokenizer import build as build_tokenizer
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur
from vocabulary import (
    CATEGORIES,
    CATEGORY_OF,
    CATEGORY_WORDS,
    NAMES,
    Scene,
    article,
    random_scene,
)

IMAGE_SIZE = 64  # 128 costs six times as much and learnt no faster


def config(vocab_size: int) -> dict:
    return {
        "embed_dim": 128,
        "init_logit_scale": 2.7,
        "init_logit_bias": -7.0,
        "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 24,
                       "head_width": 64, "patch_size": None},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": vocab_size, "width": 128,
                     "heads": 4, "layers": 3, "hf_tokenizer_name": "."},
    }  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A caption and what must be seen for it to hold."""

    text: str
    objects: frozenset[str] = frozenset()
    categories: frozenset[str] = frozenset()
    style: str | None = None
    background: str | None = None

    def holds(self, scene: Scene) -> bool:
        return (
            self.objects <= set(scene.objects)
            and self.categories <= {CATEGORY_OF[n] for n in scene.objects}
            and self.style in (None, scene.style)
            and self.background in (None, scene.background)
        )


SIMPLE = [Claim(article(n), objects=frozenset([n])) for n in NAMES] + [
    Claim(word, categories=frozenset([c])) for c, word in CATEGORY_WORDS.items()
]


def random_claim(scene: Scene, rng: random.Random) -> Claim:
    """A caption that holds for `scene`; it may leave out an object, the style, the background."""
    objects, categories, words = set(), set(), []
    mentioned = scene.objects if rng.random() < 0.5 else (rng.choice(scene.objects),)
    for name in mentioned:
        if rng.random() < 0.2:
            categories.add(CATEGORY_OF[name])
            words.append(CATEGORY_WORDS[CATEGORY_OF[name]])
        else:
            objects.add(name)
            words.append(article(name))
    if len(mentioned) == 2 and len(categories) == 2 and len(set(words)) == 1:
        words = words[:1]
    text, style, background = " and ".join(words), None, None
    if rng.random() < 0.4:
        style = scene.style
        text = f"{style} drawing of {text}" if rng.random() < 0.3 else f"{text} in {style} style"
    elif rng.random() < 0.3:
        text = f"{rng.choice(['a picture', 'an emoji'])} of {text}"
    if rng.random() < 0.4:
        background = scene.background
        text = f"{text} on a {background} background"
    return Claim(text, frozenset(objects), frozenset(categories), style, background)


def as_a_sampler_shows(
    x: torch.Tensor, generator: torch.Generator, worst: float = 1.0
) -> torch.Tensor:
    """Shift and crop, then blur, wash out towards the mean colour and add noise, by severity."""
    uniform = lambda low, high: low + (high - low) * torch.rand((), generator=generator).item()  # noqa: E731
    parts = []
    for part in x.split(max(1, len(x) // 8)):
        severity = uniform(-0.4, worst)
        margin = int(uniform(0, 7))
        part = F.pad(part, (margin,) * 4, mode="replicate")
        top, left = (int(uniform(0, 2 * margin + 0.99)) for _ in range(2))
        part = part[..., top : top + 64, left : left + 64]
        if severity > 0:
            part = gaussian_blur(part, [13, 13], [0.3 + 2.7 * severity * uniform(0, 1)] * 2)
            mean = part.mean((2, 3), keepdim=True)
            part = mean + (part - mean) * (1 - 0.5 * severity * uniform(0, 1))
            rough = torch.randn(part.shape, generator=generator)
            smooth = F.interpolate(rough[..., ::4, ::4], size=64, mode="bilinear")
            noise = uniform(0, 1) * rough + uniform(0, 1) * smooth
            part = part + 0.4 * severity * noise
        parts.append(part)
    return torch.cat(parts)


def prepare(x: torch.Tensor, preprocess: dict) -> torch.Tensor:
    """Pictures in [-1, 1] -> the guide's normalisation."""
    x = (x + 1) / 2
    mean, std = (torch.tensor(preprocess[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    return (x - mean.to(x)) / std.to(x)


def auc(scores: torch.Tensor, truth: torch.Tensor) -> float:
    ranks = scores.argsort().argsort().double() + 1
    positive = truth.sum()
    rank_sum = ranks[truth].sum() - positive * (positive + 1) / 2
    return (rank_sum / (positive * (~truth).sum())).item()


@torch.no_grad()
def evaluate(model, tokenize, preprocess, pictures, shown) -> dict[str, float]:
    model.eval()
    image = torch.cat([
        F.normalize(model.encode_image(prepare(to_float(p), preprocess)), dim=-1)
        for p in pictures.split(128)
    ])  # fmt: skip
    cos = image @ F.normalize(model.encode_text(tokenize([c.text for c in SIMPLE])), dim=-1).T
    model.train()
    truth = torch.tensor([[c.holds(s) for c in SIMPLE] for s in shown])
    single = torch.tensor([len(s.objects) == 1 for s in shown])
    n = len(NAMES)
    weapon = n + list(CATEGORIES).index("weapon")
    bomb = NAMES.index("bomb")
    return {
        "zero_shot_single": truth[single, cos[single, :n].argmax(1)].float().mean().item(),
        "zero_shot_any": truth[range(len(cos)), cos[:, :n].argmax(1)].float().mean().item(),
        "auc_a_bomb": auc(cos[:, bomb], truth[:, bomb]),
        "auc_a_weapon": auc(cos[:, weapon], truth[:, weapon]),
        "auc_objects_mean": sum(auc(cos[:, i], truth[:, i]) for i in range(n)) / n,
    }


def main() -> None:
    args = arguments(__doc__, steps=1500, batch_size=128)
    torch.manual_seed(777)
    pictures, shown = scenes(args, "train", 60_000, seed=1, pair_rate=0.5)
    held, held_shown = scenes(args, "held-out", 2_000, seed=99, pair_rate=0.5)
    folder = args.work / "guide"
    folder.mkdir(exist_ok=True)
    (args.work / "tokenizer").mkdir(exist_ok=True)
    tokenizer = build_tokenizer(args.work / "tokenizer")
    for file in (args.work / "tokenizer").iterdir():
        shutil.copy(file, folder)
    model_config = config(len(tokenizer))
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                  "resize_mode": "squash"}  # fmt: skip
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_config, "preprocess_cfg": preprocess}, indent=1)
    )
    model = open_clip.CLIP(**{k: v for k, v in model_config.items()})
    print(f"guide: {sum(p.numel() for p in model.parameters()):,} parameters")
    model.to(args.device).train()

    def tokenize(texts: list[str]) -> torch.Tensor:
        return tokenizer(
            texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
        ).input_ids.to(args.device)

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2, betas=(0.9, 0.98))
    run = Run(args, "guide", model=model, optimizer=optimizer)
    for step, generator in run:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, 1.5e-3, hold=0.3)
        rng = random.Random(step)
        pick = torch.randint(len(pictures), (args.batch_size,), generator=generator).tolist()
        drawn = [shown[i] for i in pick]
        claims = SIMPLE + [random_claim(scene, rng) for scene in drawn]
        claims += [random_claim(random_scene(rng, 0.5), rng) for _ in range(16)]
        truth = torch.tensor([[c.holds(s) for c in claims] for s in drawn]).to(args.device)
        # Easy pictures first: with the worst ones from the start it hardly learns.
        worst = min(1.0, 0.1 + 1.5 * step / args.steps)
        x = as_a_sampler_shows(to_float(pictures[pick]), generator, worst)
        x = prepare(x, preprocess).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            image = F.normalize(model.encode_image(x), dim=-1).float()
        text = F.normalize(model.encode_text(tokenize([c.text for c in claims])), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T + model.logit_bias
        each = F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none")
        loss = each[truth].mean() + each[~truth].mean() * 8
        # Among the plain object names the right one must also win.
        names = F.log_softmax(logits[:, : len(NAMES)], 1)
        wanted = truth[:, : len(NAMES)].float()
        loss = loss - (names * wanted / wanted.sum(1, keepdim=True)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            run.log(loss=loss.item(), scale=model.logit_scale.exp().item())
        if step and step % 250 == 0:
            print(evaluate(model, tokenize, preprocess, held, held_shown), flush=True)
    report = evaluate(model, tokenize, preprocess, held, held_shown)
    print(report)
    save_file(
        {k: v.half().contiguous() if v.is_floating_point() else v
         for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )  # fmt: skip
    (folder / "held_out.json").write_text(
        json.dumps({k: round(v, 4) for k, v in report.items()} | {"n": len(held)}, indent=1)
    )


if __name__ == "__main__":
    main()
