"""Two tiers: `make test` runs one of each kind, `make test-exhaustive` all others.

What takes long for what it adds is marked `exhaustive`: it says of every configuration, pipeline
or page what another test says of one.
"""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Values to parametrise with, of which `make test` takes those of `always` alone."""
    values = list(values)
    if unknown := set(always) - set(values):
        raise ValueError(f"got {unknown}, which are none of the values")
    return [
        v
        if v in always
        else pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.exhaustive)
        for v in values
    ]
