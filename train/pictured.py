"""Who looks at the pictures that define a concept: latents and densities that name none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from expunge.densities.clip_images import ClipImages
from expunge.train.prompts import outcomes

if TYPE_CHECKING:
    from expunge.train.config import TrainConfig


def latents_of(config: TrainConfig) -> Any:
    """The run's latents; `noised` ones are of the concept's pictures where they name none.

    Not where x_t is to show something else: an anchor, a subject, or twins of what was drawn.
    """
    if not config.concept.images or getattr(config.latents, "folder", None) != "":
        return config.latents
    objective, concept = config.objective, config.concept
    if hasattr(objective, "fit") or "twin/made" in objective.needs:
        return config.latents
    made = outcomes(lambda rng: objective.prompts(concept, rng)[0])
    if not all(map(concept.mentioned_in, made)):
        return config.latents
    return replace(config.latents, folder=concept.images)


def looked_at(config: TrainConfig) -> bool:
    """Whether anything of the run looks at `concept.images`."""
    densities = _densities([config.objective, config.gate])
    return latents_of(config) != config.latents or not all(d.folder for d in densities)


def _densities(settings: Any) -> Iterator[ClipImages]:
    """Those of pictures, however deep in `combination` or `calibrated`."""
    if isinstance(settings, ClipImages):
        yield settings
    elif isinstance(settings, list):
        for item in settings:
            yield from _densities(item)
    elif is_dataclass(settings):
        yield from _densities([getattr(settings, f.name) for f in fields(settings)])
