"""What a cell of a prompt list says: labels, numbers, seeds, text to fill in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from expunge.errors import UserError, nearest, unknown_name

LAST_SEED = 2**64 - 1  # the last that torch.Generator.manual_seed takes
_COLUMN = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Where:
    """Which rows are taken, by one of their columns.

    Several labels in a cell are separated by commas and compared whole, so that "activity" does
    not take "illegal activity".
    """

    any_of: list[str] = field(
        default_factory=list, metadata={"help": "labels, any of which the cell has"}
    )
    above: float | None = field(default=None, metadata={"help": "the cell is more than this"})
    at_least: float | None = field(default=None, metadata={"help": "the cell is this or more"})

    def __post_init__(self) -> None:
        if not self.any_of and self.above is None and self.at_least is None:
            raise ValueError("got a filter without a rule; allowed: any_of, above, at_least")

    def takes(self, cell: Any) -> bool:
        """Whether a row with this cell is taken.

        Raises:
            UserError: A bound, and a cell that is no number: neither taken nor left silently.
        """
        if self.any_of and not set(self.any_of) & set(labels_of(cell)):
            return False
        if self.above is None and self.at_least is None:
            return True
        value = number(cell)
        if value is None:
            raise UserError(f"got {cell!r}; allowed: a number")
        return not (
            (self.above is not None and value <= self.above)
            or (self.at_least is not None and value < self.at_least)
        )


def labels_of(cell: Any) -> list[str]:
    """The labels of a cell, each once: "violence, illegal activity" -> two; a list is one."""
    parts = cell if isinstance(cell, (list, tuple)) else str(cell or "").split(",")
    return list(dict.fromkeys(str(part).strip() for part in parts if str(part).strip()))


def pick(row: dict[str, Any], column: str | list[str], where: str) -> Any:
    """The cell of a column, or of the first that is there of several names for it.

    Raises:
        UserError: The row has none of them.
    """
    names = [column] if isinstance(column, str) else column
    for name in names:
        if name in row:
            return row[name]
    raise unknown_name(f"column of {where}", " or ".join(names), map(str, row))


def number(cell: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(cell, bool):
        return None
    try:
        value = float(str(cell).strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def whole(cell: Any) -> int | None:
    """A whole number, exact beyond 2⁵³ too: "4048860635", 7, "7.0"; None for anything else."""
    if isinstance(cell, bool):
        return None
    try:
        value = Decimal(str(cell).strip())
    except InvalidOperation:
        return None
    return int(value) if value.is_finite() and value == value.to_integral_value() else None


def seed_of(cell: Any, repeat: int = 1) -> int:
    """The first of ``repeat`` seeds in turn.

    Raises:
        UserError: No whole number from 0 to 2⁶⁴ - 1.
    """
    seed = whole(cell)
    # torch takes negative seeds for others than they say.
    if seed is None or not 0 <= seed <= LAST_SEED - (repeat - 1):
        raise UserError(f"got seed {cell!r}; allowed: a whole number from 0 to {LAST_SEED}")
    return seed


def size_of(cell: Any) -> int | None:
    """A picture's height or width; None for an empty cell.

    Raises:
        UserError: No positive multiple of 8, the factor of Stable Diffusion's VAE.
    """
    if blank(cell):
        return None
    size = whole(cell)
    if size is None or size < 8 or size % 8:
        raise UserError(f"got size {cell!r}; allowed: a positive multiple of 8")
    return size


def guidance_of(cell: Any) -> float | None:
    """A guidance scale; None for an empty cell.

    Raises:
        UserError: Negative or no number.
    """
    if blank(cell):
        return None
    scale = number(cell)
    if scale is None or scale < 0:
        raise UserError(f"got guidance scale {cell!r}; allowed: a number from 0 on")
    return scale


def blank(cell: Any) -> bool:
    """Whether a cell holds nothing."""
    return cell is None or not str(cell).strip()


def fill(template: str, row: dict[str, Any], where: str) -> str:
    """Put a row's cells into a template: "a photo of {noun}".

    Raises:
        UserError: The template names a column that is not there.
    """
    return _COLUMN.sub(lambda match: str(pick(row, match[1], where)).strip(), template)


def columns_of(template: str) -> list[str]:
    """The columns that a template names."""
    return _COLUMN.findall(template)


def no_such_label(column: str, wanted: list[str], known: set[str]) -> str:
    """Why a filter took no row, for an error."""
    guess = next((near for want in wanted if (near := nearest(want, known))), None)
    few = ", ".join(sorted(known)[:12]) or "nothing"
    return f"{column} holds {few}" + (f"; did you mean {guess}?" if guess else "")
