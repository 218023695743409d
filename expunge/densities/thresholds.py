"""Thresholds as people write them: one for all concepts, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from expunge.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def check_threshold(threshold: float | Sequence[float], low: float, high: float) -> None:
    """Refuse a threshold that no score of the range [low, high] could mean.

    Raises:
        ValueError: None at all, or one outside the range.
    """
    for value in one_or_more(threshold):
        # Written so that NaN is refused too.
        if not low <= value <= high:
            raise ValueError(
                f"got threshold {value}; allowed: {low:g} to {high:g}, which is all that a score "
                "can be"
            )
    if not one_or_more(threshold):
        raise ValueError("got no threshold; allowed: one for all concepts, or one for each")


def spread_threshold(
    threshold: float | Sequence[float], names: Sequence[str], device: Any = "cpu"
) -> Tensor:
    """η of each concept, (M,).

    Raises:
        UserError: Neither one threshold nor as many as concepts.
    """
    import torch

    values = one_or_more(threshold)
    if len(values) not in (1, len(names)):
        raise UserError(
            f"got {len(values)} thresholds for {len(names)} concepts ({', '.join(names)}); "
            "allowed: one for all, or one for each"
        )
    return torch.tensor(values, dtype=torch.float32, device=device).expand(len(names)).clone()


def check_top_k(top_k: int | None, names: Sequence[str] | None = None) -> None:
    """Refuse a K that is not from 1 to M.

    Raises:
        ValueError: K is below 1.
        UserError: K is above the number of concepts.
    """
    if top_k is None:
        return
    if top_k < 1:
        raise ValueError(f"got top_k {top_k}; allowed: 1 or more, or null for the mean of all")
    if names is not None and top_k > len(names):
        raise UserError(
            f"got top_k {top_k} for {len(names)} concepts ({', '.join(names)}); allowed: 1 to "
            f"{len(names)}, or null for the mean of all"
        )


def one_or_more(value: Any) -> list[Any]:
    """A list as it is, anything else as a list of one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]
