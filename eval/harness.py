"""generate → score → measure, in steps that can each be interrupted and repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from expunge.errors import UserError
from expunge.eval.cases import Case, Observation
from expunge.eval.detectors import OpenDetector
from expunge.eval.generators import Generator
from expunge.eval.metrics import Counter
from expunge.eval.store import ImageStore, Pixels
from expunge.results import Measurement


@dataclass(frozen=True)
class Score:
    """What the detector says about the picture of one case.

    Attributes:
        picture: Its key in the store.
        seen: The detector's scores; None when it could not judge.
        error: Why it could not.
        answers: Metric -> the answer to its question; None is unknown, never "not seen".
    """

    picture: str
    seen: Observation | None
    error: str | None
    answers: dict[str, bool | None]


@dataclass(frozen=True)
class Outcome:
    """One model under evaluation.

    Attributes:
        identity: What its pictures depend on.
        scores: One for each case, in order.
        metrics: What was counted.
        breakdown: The same for each target, object or style: metric -> about -> measurement.
        generated: Pictures that were made now rather than found.
    """

    identity: dict[str, Any]
    scores: tuple[Score, ...]
    metrics: dict[str, Measurement]
    breakdown: dict[str, dict[str, Measurement]]
    generated: int


def evaluate(
    generator: Generator,
    cases: Sequence[Case],
    metrics: Mapping[str, Counter],
    detector: OpenDetector,
    threshold: float,
    store: ImageStore,
    *,
    batch_size: int = 16,
    label: str = "model",
) -> Outcome:
    """Generate what the store lacks, judge every picture and count.

    Args:
        generator: The model.
        cases: The pictures and the questions about them.
        metrics: What is counted, by the names that the questions use.
        detector: The judge.
        threshold: A label counts as seen from this score on.
        store: Where pictures are kept; what is there is not made again.
        batch_size: Pictures at a time; results do not depend on it.
        label: The model's name beside the progress bar.
    """
    asked = {label for case in cases for q in case.questions for label in q.labels}
    if missing := asked - detector.labels:
        raise UserError(
            f"got a suite that asks for {', '.join(sorted(missing))}; allowed: what its detector "
            f"tells: {', '.join(sorted(detector.labels)[:8])}…"
        )
    if unknown := {q.metric for case in cases for q in case.questions} - set(metrics):
        raise ValueError(f"the suite has no metric {', '.join(sorted(unknown))}")
    keys, generated = produce(generator, cases, store, batch_size=batch_size, label=label)
    scores = judge(cases, keys, detector, threshold, store, batch_size=batch_size)
    return Outcome(
        identity=generator.identity(),
        scores=tuple(scores),
        metrics=measure(scores, metrics),
        breakdown=break_down(cases, scores, metrics),
        generated=generated,
    )


def produce(
    generator: Generator,
    cases: Sequence[Case],
    store: ImageStore,
    *,
    batch_size: int = 16,
    label: str = "model",
) -> tuple[list[str], int]:
    """Make the pictures that the store lacks.

    Returns:
        The key of every case's picture, and how many were made now.
    """
    identity = generator.identity()
    store.describe(identity)
    keys = [store.key(identity, case.prompt, case.seed) for case in cases]
    wanted = dict(zip(keys, cases, strict=True))
    missing = [(key, case) for key, case in wanted.items() if store.read(key) is None]
    done = len(wanted) - len(missing)
    with tqdm(total=len(wanted), initial=done, desc=label, unit="image", disable=None) as bar:
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            images = generator.generate([c.prompt for _, c in part], [c.seed for _, c in part])
            for (key, case), pixels in zip(part, to_pixels(images), strict=True):
                store.write(key, pixels, case.prompt, case.seed)
                bar.update()
    return keys, len(missing)


def judge(
    cases: Sequence[Case],
    keys: Sequence[str],
    detector: OpenDetector,
    threshold: float,
    store: ImageStore,
    *,
    batch_size: int = 16,
) -> list[Score]:
    """Let the detector look at the stored pictures, so that a rerun sees the very same ones."""
    scores = []
    for start in range(0, len(cases), batch_size):
        part = keys[start : start + batch_size]
        found = observe([store.read(key) for key in part], detector)
        for case, key, (seen, error) in zip(cases[start:], part, found, strict=False):
            answers = {
                q.metric: None if seen is None else q.answer(seen, threshold)
                for q in case.questions
            }
            scores.append(Score(key, seen, error, answers))
    return scores


def observe(
    pictures: Sequence[Pixels | None], detector: OpenDetector
) -> list[tuple[Observation | None, str | None]]:
    """What the detector sees in each picture, or why it could not tell.

    A batch that fails is taken picture by picture, so that one bad picture costs only itself.
    """
    if not pictures:
        return []
    try:
        if any(picture is None for picture in pictures):
            raise ValueError("the picture is missing or damaged")
        images = to_tensor([picture for picture in pictures if picture is not None])
        found = detector.observe(images)
        if len(found) != len(pictures):
            raise ValueError(f"the detector gave {len(found)} answers on {len(pictures)} pictures")
        for seen in found:
            bad = [label for label in detector.labels if not 0 <= seen[label] <= 1]
            if bad:
                raise ValueError(f"the detector gave {seen[bad[0]]} for {bad[0]}")
    # Whatever a detector raises means that it did not judge; it must never end up as "not seen".
    except Exception as error:
        if len(pictures) == 1:
            return [(None, f"{type(error).__name__}: {error}")]
        return [observe([picture], detector)[0] for picture in pictures]
    return [(seen, None) for seen in found]


def measure(scores: Sequence[Score], metrics: Mapping[str, Counter]) -> dict[str, Measurement]:
    """Every metric over all of its answers."""
    return {
        name: metric.compute([s.answers[name] for s in scores if name in s.answers])
        for name, metric in metrics.items()
    }


def break_down(
    cases: Sequence[Case], scores: Sequence[Score], metrics: Mapping[str, Counter]
) -> dict[str, dict[str, Measurement]]:
    """Every metric for each target, object or style that its pictures are about."""
    parts: dict[str, dict[str, list[bool | None]]] = {name: {} for name in metrics}
    for case, score in zip(cases, scores, strict=True):
        for name, answer in score.answers.items():
            parts[name].setdefault(case.about, []).append(answer)
    return {
        name: {about: metrics[name].compute(answers) for about, answers in rows.items()}
        for name, rows in parts.items()
    }


def changed(
    cases: Sequence[Case], outcome: Outcome, base: Outcome, store: ImageStore
) -> dict[str, Measurement]:
    """Of each group, the pictures that differ from the base's of the same prompt and seed at all.

    A single bit counts: a sampler that leaves a trajectory alone leaves its picture alone.
    """
    parts: dict[str, list[bool | None]] = {}
    for case, ours, theirs in zip(cases, outcome.scores, base.scores, strict=True):
        one, other = store.read(ours.picture), store.read(theirs.picture)
        differs = None if one is None or other is None else not np.array_equal(one, other)
        parts.setdefault(case.group, []).append(differs)
    return {
        group: Measurement.proportion(
            sum(map(bool, found)),
            len(found) - found.count(None),
            higher_is_better=False,
            unknown=found.count(None),
        )
        for group, found in parts.items()
    }


def to_pixels(images: Tensor) -> list[Pixels]:
    """Pictures (B, 3, H, W) in [-1, 1] -> B arrays (H, W, 3) of bytes, rounded to nearest."""
    if not torch.isfinite(images).all():
        raise FloatingPointError("the model made pictures that hold NaN or infinite values")
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [np.ascontiguousarray(x) for x in scaled.permute(0, 2, 3, 1).cpu().numpy()]


def to_tensor(pixels: Sequence[Pixels]) -> Tensor:
    """B arrays (H, W, 3) of bytes -> (B, 3, H, W) in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pixels))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1
