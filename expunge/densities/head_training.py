"""Train a head on CLIP features from a few dozen labelled pictures, in seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.clip import Clip, load_clip
from expunge.densities.clip_head import Head, write_head
from expunge.errors import UserError
from expunge.pictures import picture_files, read_picture
from expunge.results import provenance

HARMFUL, BENIGN = "harmful", "benign"


@dataclass(frozen=True)
class HeadReport:
    """How well a head tells pictures apart that it was not trained on.

    Attributes:
        accuracy: Share of pictures on the right side of 1/2, each judged by a head trained without
            it, the two classes weighing the same.
        auc: Chance that a harmful picture scores above a benign one, likewise held out.
        right: Pictures on the right side, every one counting the same.
        harmful: Harmful pictures.
        benign: Benign pictures.
        folds: Parts of the cross-validation.
        seconds: For everything.
    """

    accuracy: float
    auc: float
    right: int
    harmful: int
    benign: int
    folds: int
    seconds: float


def train_head(
    folder: str | Path,
    file: str | Path,
    clip: str = "emoji",
    *,
    name: str = "",
    hidden: int = 0,
    weight_decay: float = 0.1,
    steps: int = 300,
    seed: int = 0,
    device: Any = "cpu",
    overwrite: bool = False,
) -> HeadReport:
    """Write a head that tells `folder/harmful` from `folder/benign`, and say how well it does.

    min_w  ½ E_harmful[−log σ(f)] + ½ E_benign[−log(1 − σ(f))] + (weight_decay / 2) ‖w‖², over
    centred features of unit mean deviation, by full-batch Adam: a class counts the same however
    many pictures it has. Accuracy and AUC are cross-validated. What Yoon et al. (arXiv 2307.02770)
    call three minutes of human feedback.

    Args:
        folder: Holds the folders `harmful` and `benign`, two pictures each at least.
        file: The safetensors file to write.
        clip: The CLIP below the head.
        name: What harmful means here; the folder's name when empty.
        hidden: Units of the hidden layer; 0 for a linear head.
        weight_decay: Strength of the penalty.
        steps: Steps of Adam.
        seed: Of the folds, and of the hidden layer's start.
        device: Where the CLIP runs.
        overwrite: Write over an existing file.

    Raises:
        UserError: A folder or picture is missing or broken, or the file exists.
    """
    begun = time.perf_counter()
    if not str(file).endswith(".safetensors"):
        raise UserError(f"got head file {file}; allowed: a name that ends in .safetensors")
    if Path(file).exists() and not overwrite:
        raise UserError(f"got head file {file}, which exists; choose another, or say overwrite")
    if hidden < 0 or steps < 1 or weight_decay < 0:
        raise ValueError("got hidden or weight_decay below 0, or steps below 1; allowed: not so")
    files = [picture_files(Path(folder) / kind) for kind in (HARMFUL, BENIGN)]
    if min(map(len, files)) < 2:
        raise UserError(
            f"got {len(files[0])} harmful and {len(files[1])} benign pictures in {folder}; "
            "allowed: two of each at least, better some dozens"
        )
    guide = load_clip(clip, device)
    label = name or Path(folder).resolve().name
    settings: dict[str, Any] = {
        "hidden": hidden,
        "weight_decay": weight_decay,
        "steps": steps,
        "seed": seed,
    }
    head, report, _ = learn(files[0], files[1], guide, label, **settings)
    report = replace(report, seconds=time.perf_counter() - begun)
    about = {
        **settings,
        "classes": [BENIGN, HARMFUL],
        "held_out": asdict(report),
        "provenance": provenance(),
    }
    write_head(file, head, about)
    return report


def learn(
    harmful: Sequence[Path],
    benign: Sequence[Path],
    guide: Clip,
    name: str,
    *,
    hidden: int = 0,
    weight_decay: float = 0.1,
    steps: int = 300,
    seed: int = 0,
) -> tuple[Head, HeadReport, Tensor]:
    """A head for the harmful among some picture files; see `train_head`.

    Returns:
        The head; how well it does; and the logit (N,) that each picture, the harmful first, gets
        from a head trained without it.
    """
    begun = time.perf_counter()
    pictures = [read_picture(path) for path in (*harmful, *benign)]
    with torch.no_grad():
        features = torch.cat([guide.encode_images(p[None].to(guide.device)) for p in pictures])
    features = features.cpu()
    truth = torch.tensor([True] * len(harmful) + [False] * len(benign))
    settings = (hidden, weight_decay, steps, seed)
    held_out = torch.zeros(len(truth))
    folds = _folds(truth, seed)
    for fold in folds.unique():
        left = folds == fold
        without = Head(fit(features[~left], truth[~left], *settings))
        held_out[left] = without.logits(features[left])
    right = (held_out > 0) == truth
    report = HeadReport(
        accuracy=(right[truth].float().mean().item() + right[~truth].float().mean().item()) / 2,
        auc=auc(held_out, truth),
        right=int(right.sum()),
        harmful=len(harmful),
        benign=len(benign),
        folds=len(folds.unique()),
        seconds=time.perf_counter() - begun,
    )
    head = Head(fit(features, truth, *settings), guide.name, guide.sha256, name)
    return head, report, held_out


@torch.enable_grad()
def fit(
    features: Tensor, truth: Tensor, hidden: int, weight_decay: float, steps: int, seed: int
) -> dict[str, Tensor]:
    """The tensors of a head that tells features (N, D) with truth (N,) from those without."""
    mean = features.mean(0)
    scale = (features - mean).square().mean().sqrt().clamp(min=1e-6)
    x = (features - mean) / scale
    d, generator = features.shape[1], torch.Generator().manual_seed(seed)
    if hidden:
        start = {
            "hidden.weight": torch.randn(hidden, d, generator=generator) / d**0.5,
            "hidden.bias": torch.zeros(hidden),
            "weight": torch.randn(1, hidden, generator=generator) / hidden**0.5,
        }
    else:
        start = {"weight": torch.zeros(1, d)}
    start["bias"] = torch.zeros(1)
    tensors = {key: value.requires_grad_() for key, value in start.items()}
    optimizer = torch.optim.Adam(tensors.values(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sign = torch.where(truth, 1.0, -1.0)
    for _ in range(steps):
        loss = F.softplus(-sign * Head(tensors).logits(x))
        penalty = sum(v.square().sum() for k, v in tensors.items() if k.endswith("weight"))
        total = (loss[truth].mean() + loss[~truth].mean() + weight_decay * penalty) / 2
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
    found = {key: value.detach() for key, value in tensors.items()}
    # Folded into the first layer, so that the head takes features as they come.
    first = "hidden." if hidden else ""
    found[f"{first}weight"] = found[f"{first}weight"] / scale
    found[f"{first}bias"] = found[f"{first}bias"] - found[f"{first}weight"] @ mean
    return found


def auc(scores: Tensor | Sequence[float], truth: Tensor | Sequence[bool]) -> float:
    """Area under the ROC curve: P(score of a true one > of a false one), ties counting half."""
    values, true = torch.as_tensor(scores), torch.as_tensor(truth)
    difference = values[true][:, None] - values[~true][None]
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def _folds(truth: Tensor, seed: int) -> Tensor:
    """The fold of each picture: five, or as many as the smaller class has pictures."""
    generator = torch.Generator().manual_seed(seed)
    n = min(5, int(truth.sum()), int((~truth).sum()))
    folds = torch.zeros(len(truth), dtype=torch.long)
    for kind in (truth, ~truth):
        members = kind.nonzero().flatten()
        order = members[torch.randperm(len(members), generator=generator)]
        folds[order] = torch.arange(len(members)) % n
    return folds
