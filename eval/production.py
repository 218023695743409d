"""Making the pictures that an evaluation needs and its store lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from expunge.eval.cases import Case, Sampling
from expunge.eval.generators import Generator
from expunge.eval.reasons import reason
from expunge.eval.store import ImageStore, Pixels
from expunge.eval.team import ALONE, Team


def produce(
    generator: Generator,
    cases: Sequence[Case],
    store: ImageStore,
    *,
    label: str = "model",
    team: Team = ALONE,
) -> tuple[list[str], int]:
    """Make the pictures that the store lacks; of several processes, each its share.

    A picture that comes out as NaN is not made: the store tells why, and a rerun tries it again.

    Returns:
        The key of every case's picture, and how many were made now, by all processes.
    """
    identity = generator.identity()
    store.describe(identity)
    keys = [store.key(identity, case.prompt, case.seed, case.sampling) for case in cases]
    wanted = team.share(list(dict(zip(keys, cases, strict=True)).items()))
    missing = [(key, case) for key, case in wanted if store.read(key) is None]
    done = len(wanted) - len(missing)
    # A terminal shows the progress of the first process; shares are even.
    quiet = None if team.leads else True
    made = 0
    with tqdm(total=len(wanted), initial=done, desc=label, unit="image", disable=quiet) as bar:
        for sampling, part in _batches(generator, missing):
            drawn = _draw(generator, [case for _, case in part], sampling)
            for (key, case), pixels in zip(part, drawn, strict=True):
                if isinstance(pixels, str):
                    store.fail(key, pixels)
                else:
                    store.write(key, pixels, case.prompt, case.seed)
                    made += 1
                bar.update()
    return keys, sum(team.gather(made))  # which waits for all


def _draw(generator: Generator, cases: Sequence[Case], sampling: Sampling) -> list[Pixels | str]:
    """Pictures, or why there is none: one that is NaN costs only itself."""
    prompts, seeds = [case.prompt for case in cases], [case.seed for case in cases]
    try:
        return list(to_pixels(generator.generate(prompts, seeds, sampling)))
    except FloatingPointError as error:
        if len(cases) == 1:
            return [reason(error)]
        return [_draw(generator, [case], sampling)[0] for case in cases]


def _batches(
    generator: Generator, missing: Sequence[tuple[str, Case]]
) -> Iterator[tuple[Sampling, list[tuple[str, Case]]]]:
    """Pictures that are sampled alike, as many as the generator takes at once."""
    alike: dict[Sampling, list[tuple[str, Case]]] = {}
    for key, case in missing:
        alike.setdefault(case.sampling, []).append((key, case))
    for sampling, rows in alike.items():
        shape = generator.shape(sampling)
        for start in range(0, len(rows), shape):
            yield sampling, rows[start : start + shape]


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
