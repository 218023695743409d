"""What one row of a table of samplers says: one `expunge eval`, and what its report leaves out."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from expunge.backbones import BUNDLED, bundled, load_pipeline, recommended_guidance
from expunge.clip import load_clip
from expunge.concepts import Concept
from expunge.configuration import parse
from expunge.errors import UserError
from expunge.eval.command import EvalConfig, run
from expunge.eval.detectors.emoji_judge import load_judge
from expunge.eval.metrics.discrepancy import mmd2, polynomial
from expunge.eval.production import to_tensor
from expunge.eval.store import ImageStore
from expunge.generation import generate
from expunge.sampling.samplers import SAMPLERS

Features = Callable[[Tensor], Tensor]


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


def row(
    settings: dict[str, Any],
    folder: Path,
    store: Path,
    *,
    concept: list[str],
    suite: str,
    model: str = "emoji",
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
        limit: Pictures a group.
        clip: Whose cosine is the CLIP score. It is no verdict on rows that it steers.
        lora: Folders of LoRA weights.

    Raises:
        UserError: As `expunge eval`, or the suite makes a single picture.
    """
    report = run(
        EvalConfig(
            output_dir=folder, suite=suite, model=model, sampler=sampler_of(settings),
            concept=concept, limit=limit, store=store, lora=list(lora),
        )
    )  # fmt: skip
    cases = json.loads((folder / "scores.json").read_text())["rows"]
    if len(cases) < 2:
        raise UserError("got one picture; allowed: two or more, for a distance; raise --limit")
    pictures = ImageStore(store)
    ours, base = (
        to_tensor([pictures.read(case[name]["picture"]) for case in cases])
        for name in ("erased", "base")
    )
    features, eye = features_of(model, clip), load_clip(clip)
    with torch.no_grad():
        seen = [
            torch.cat([features(part) for part in x.split(64)]).double().numpy()
            for x in (ours, base)
        ]
        texts = eye.encode_texts([case["prompt"] for case in cases])
        score = torch.cat([eye.encode_images(part) for part in ours.split(64)]).mul(texts).sum(1)
    found = mmd2(*seen, polynomial, np.zeros(len(cases), int), paired=True)
    assert found is not None  # two pictures or more
    metrics = report["metrics"]
    harmful = {
        case["group"]
        for case in cases
        if any(not metrics[name]["higher_is_better"] for name in case["erased"]["answers"])
    }
    counts = [m for group, m in report["changed"].items() if group not in harmful]
    n = sum(m["n"] for m in counts)
    return {
        "metrics": metrics,
        "relative": report["relative"],
        "base": report["base"],
        "benign_changed": sum(round(m["value"] * m["n"]) for m in counts) / n if n else None,
        "benign_n": n,
        "kid": found[0],
        "clip_score": float(score.mean()),
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
