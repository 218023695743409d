"""What one row of a table of samplers says: one `expunge eval`, and what its report leaves out."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from expunge.backbones import BUNDLED, bundled, load_pipeline, recommended_guidance
from expunge.clip import Clip, load_clip
from expunge.concepts import Concept
from expunge.configuration import parse
from expunge.errors import UserError
from expunge.eval.command import EvalConfig, run
from expunge.eval.detectors.emoji_judge import load_judge
from expunge.eval.metrics.discrepancy import mmd2, polynomial
from expunge.eval.production import to_tensor
from expunge.eval.store import ImageStore, Pixels
from expunge.generation import generate
from expunge.sampling.samplers import SAMPLERS

Features = Callable[[Tensor], Tensor]
AT_ONCE = 64


@dataclass(frozen=True)
class _Holder:
    sampler: Annotated[Any, SAMPLERS]


def sampler_of(settings: dict[str, Any]) -> Any:
    """A sampler from its settings as a configuration file would have them."""
    return parse(_Holder, ["--sampler", json.dumps(settings)], "sampler").sampler


def features_of(model: str, clip: str) -> Features:
    """(n, d) of pictures: the judge's for the bundled model, else those of a CLIP."""
    if model in BUNDLED:
        judge, _ = load_judge(bundled(model) / "judge")
        return judge.features
    return load_clip(clip).encode_images


def batches(store: ImageStore, keys: Sequence[str]) -> Iterator[tuple[list[int], Tensor]]:
    """Places and pictures (B, 3, H, W), those of one size together; without what cannot be read."""
    waiting: dict[tuple[int, ...], list[tuple[int, Pixels]]] = {}
    for place, key in enumerate(keys):
        if (pixels := store.read(key)) is not None:
            same = waiting.setdefault(pixels.shape, [])
            same.append((place, pixels))
            if len(same) == AT_ONCE:
                yield _batch(waiting.pop(pixels.shape))
    yield from map(_batch, waiting.values())


def _batch(same: Sequence[tuple[int, Pixels]]) -> tuple[list[int], Tensor]:
    return [place for place, _ in same], to_tensor([pixels for _, pixels in same])


def distance(
    ours: Sequence[str], base: Sequence[str], prompts: Sequence[str], store: ImageStore,
    features: Features, eye: Clip,
) -> dict[str, Any]:  # fmt: skip
    """KID to the base's pictures of the same places, and CLIP score.

    Args:
        ours: Keys of the pictures.
        base: Keys of the base's.
        prompts: What they show.
        store: Where both are.
        features: On which the KID is.
        eye: Whose cosine is the CLIP score.

    Returns:
        Both over the places of which both pictures can be read, and how many are ``unknown``; None
        where too few are left.
    """
    seen: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
    cosine: dict[int, float] = {}
    with torch.no_grad():
        for rows, keys in zip(seen, (ours, base), strict=True):
            for places, images in batches(store, keys):
                rows.update(zip(places, features(images).double().numpy(), strict=True))
                if keys is ours:
                    texts = eye.encode_texts([prompts[i] for i in places])
                    found = eye.encode_images(images).mul(texts).sum(1)
                    cosine.update(zip(places, found.tolist(), strict=True))
    known = sorted(seen[0].keys() & seen[1].keys())
    kid = None
    if len(known) > 1:
        one, other = (np.stack([rows[i] for i in known]) for rows in seen)
        kid = mmd2(one, other, polynomial, np.zeros(len(known), int), paired=True)
    return {
        "kid": kid and kid[0],
        "clip_score": statistics.fmean(cosine[i] for i in known) if known else None,
        "unknown": len(ours) - len(known),
    }


def row(
    settings: dict[str, Any],
    folder: Path,
    store: Path,
    *,
    concept: list[str],
    suite: str,
    model: str = "emoji",
    prompts: Path | None = None,
    limit: int | None = None,
    clip: str = "emoji",
    lora: Sequence[str] = (),
) -> dict[str, Any]:
    """One evaluation of a sampler or LoRA beside the base: KID, CLIP score, what was changed.

    Args:
        settings: Of the sampler.
        folder: For its report; there already, it is read again.
        store: Pictures, shared by all rows.
        concept: What is guarded against.
        suite: Name or file.
        model: Whom it guards.
        prompts: Another list than the suite's.
        limit: Pictures a group.
        clip: Whose cosine is the CLIP score. It is no verdict on rows that it steers.
        lora: Folders of LoRA weights.

    Raises:
        UserError: As `expunge eval`, or the suite makes a single picture.
    """
    report = run(
        EvalConfig(
            output_dir=folder, suite=suite, model=model, sampler=sampler_of(settings),
            concept=concept, limit=limit, store=store, lora=list(lora), prompts=prompts,
        )
    )  # fmt: skip
    cases = json.loads((folder / "scores.json").read_text())["rows"]
    if len(cases) < 2:
        raise UserError("got one picture; allowed: two or more, for a distance; raise --limit")
    ours, base = ([case[name]["picture"] for case in cases] for name in ("erased", "base"))
    said = [case["prompt"] for case in cases]
    features, eye = features_of(model, clip), load_clip(clip)
    found = distance(ours, base, said, ImageStore(store), features, eye)
    metrics = report["metrics"]
    harmful = {
        case["group"]
        for case in cases
        if any(not metrics[name]["higher_is_better"] for name in case["erased"]["answers"])
    }
    counts = [m for group, m in report["changed"].items() if group not in harmful and m["n"]]
    n = sum(m["n"] for m in counts)
    return {
        "metrics": metrics,
        "relative": report["relative"],
        "base": report["base"],
        "benign_changed": sum(round(m["value"] * m["n"]) for m in counts) / n if n else None,
        "benign_n": n,
        **found,
        "n": len(cases),
    }


def cost(settings: dict[str, Any], prompts: list[str], concept: list[str], rounds: int) -> float:
    """Seconds on the bundled model relative to plain sampling, median of rounds run in turn."""
    plain = load_pipeline("emoji")
    guarded = sampler_of(settings).wrap(plain, Concept(targets=concept))

    def seconds(pipeline: Any) -> float:
        begun = time.perf_counter()
        generate(
            pipeline, prompts, range(len(prompts)), steps=25,
            guidance_scale=recommended_guidance("emoji"),
        )  # fmt: skip
        return time.perf_counter() - begun

    seconds(guarded)
    return statistics.median(seconds(guarded) / seconds(plain) for _ in range(rounds))
