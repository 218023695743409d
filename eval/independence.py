"""The CLIP that guides never judges: a gradient can please it and leave what is in the picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from expunge.errors import UserError


def refuse_own_judge(protocol: Mapping[str, Any], sampler: Any) -> None:
    """Refuse a judge that sees through a CLIP of the sampler.

    Args:
        protocol: A detector's or a metric's.
        sampler: The sampler's identity, a JSON value.

    Raises:
        UserError: The sampler's identity names one of the protocol's CLIPs.
    """
    guides = json.dumps(sampler)
    if any(clip in guides for clip in clips_of(protocol)):
        raise UserError(
            "got a suite of which a detector or a metric sees through the CLIP that guides the "
            "sampler; allowed: an independent judge; change one of them"
        )


def clips_of(protocol: Any) -> Iterator[str]:
    """The hashes of all CLIPs that a protocol names under `clips`, at any depth."""
    if isinstance(protocol, list):
        for part in protocol:
            yield from clips_of(part)
    elif isinstance(protocol, Mapping):
        for key, value in protocol.items():
            yield from value if key == "clips" else clips_of(value)
