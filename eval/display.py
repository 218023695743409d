"""Measurements as people read them: 12.5 % [5.8, 24.7]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"


def number(m: Mapping[str, Any]) -> str:
    """The value: a share in per cent, a plain number in four digits."""
    return plain(m["value"], m.get("unit", "share"))


def interval(m: Mapping[str, Any]) -> str:
    """The 95 % interval in brackets; nothing without one."""
    if m["low"] is None or m["high"] is None:
        return ""
    if m.get("unit", "share") == "share":
        return f"[{100 * m['low']:.1f}, {100 * m['high']:.1f}]"
    return f"[{m['low']:.4g}, {m['high']:.4g}]"


def both(m: Mapping[str, Any]) -> str:
    """Value, interval and how many pictures could not be judged."""
    unknown = f"({m['unknown']} unknown)" if m["unknown"] else ""
    return " ".join(filter(None, [number(m), interval(m), unknown]))


def plain(value: float | None, unit: str = "share") -> str:
    """A value that stands alone."""
    if value is None:
        return MISSING
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.4g}"


def of_base(ratio: float | None, ends: Sequence[float] | None) -> str:
    """A share of the base's own value, with its interval."""
    low, high = ends or (None, None)
    return " ".join(filter(None, [plain(ratio), interval({"low": low, "high": high})]))


def difference(value: float, unit: str = "share") -> str:
    """A difference with its sign; of shares in percentage points."""
    text = f"{100 * value:+.1f}" if unit == "share" else f"{value:+.4g}"
    # What rounds to nothing has no sign.
    text = text.lstrip("+-") if not float(text) else text
    return text.replace("-", "−")


def probability(p: float | None) -> str:
    """A p-value: three digits, and never 0."""
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
