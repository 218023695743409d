"""The CLIP that guides never judges: a gradient can please it and leave what is in the picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.densities.base import clips_of
from expunge.errors import UserError


def refuse_own_judge(
    judges: Sequence[Mapping[str, Any]], sampler: Any, loras: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Refuse judges that see through a CLIP of the sampler, or of the training of a LoRA.

    Args:
        judges: The protocols of detectors and metrics.
        sampler: The sampler's identity, a JSON value.
        loras: What each LoRA says of itself.

    Returns:
        A note on each LoRA of which this is not known, where a judge sees through a CLIP at all.

    Raises:
        UserError: One of the judges' CLIPs is named by the sampler or by a LoRA.
    """
    theirs = set(clips_of(list(judges)))
    guides = {"guides the sampler": sampler}
    guides |= {f"guided the training of LoRA {lora}": about for lora, about in loras.items()}
    for what, guide in guides.items():
        said = json.dumps(guide)
        if any(clip in said for clip in theirs):
            raise UserError(
                "got a suite of which a detector or a metric sees through the CLIP that "
                f"{what}; allowed: an independent judge; change one of them"
            )
    return [
        f"LoRA {lora} does not say which CLIP guided its training; whether a detector or a metric "
        "sees through the same one is not known"
        for lora, about in loras.items()
        if theirs and not _tells(about)
    ]


def _tells(about: Mapping[str, Any]) -> bool:
    """Whether a LoRA, and each that was merged into it, says what guided its training.

    Only what a density guided has `clips`; of a density without, such as a function of the user's,
    nobody knows, nor of what was trained when CLIPs were known by other hashes.
    """
    from expunge.clip import EYE

    parts = about.get("merged_from", [about])
    return all(
        all(clip.startswith(EYE) for clip in x["clips"])
        if "clips" in x
        else x.get("objective", "density") != "density"
        for x in parts
    )
