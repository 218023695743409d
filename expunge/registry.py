"""Tables of names: literal rows, loaded only when asked for, open to other distributions."""

import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from expunge.errors import UserError, unknown_name

_defined: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Entry:
    """One row: where the object is, and one line about it that costs no import.

    Attributes:
        target: ``"module:object"``.
        summary: What the row is, in one line.
    """

    target: str
    summary: str

    def __post_init__(self) -> None:
        module, colon, name = self.target.partition(":")
        if not (module and colon and name):
            raise ValueError(f"got target {self.target!r}; allowed: 'module:object'")


class Registry(Mapping[str, Entry]):
    """A table of named objects: name -> ``"module:object"``, loaded when asked for.

    Other distributions add rows through the entry-point group ``expunge.<table>``.

    Args:
        table: What a row is, in the singular ("objective"); it is used in error messages.
        rows: The literal rows, in the order in which they are listed.
    """

    def __init__(self, table: str, rows: Mapping[str, Entry]) -> None:
        self.table = table
        self._rows: dict[str, Entry] = {}
        self._plugins_read = False
        _refuse_second_copy(table)
        for name, entry in rows.items():
            self.add(name, entry)

    def add(self, name: str, entry: Entry) -> None:
        """Add a row; a name that is taken raises."""
        if name in self._rows:
            raise ValueError(
                f"{self.table} {name!r} is already {self._rows[name].target}; "
                f"got {entry.target} as well"
            )
        self._rows[name] = entry

    def names(self) -> list[str]:
        """Every name, in table order, plugins last."""
        return list(self)

    def load(self, name: str) -> Any:
        """Import and return the object called ``name``.

        Raises:
            UserError: No row has this name.
        """
        try:
            entry = self[name]
        except (KeyError, TypeError):
            raise unknown_name(self.table, name, self) from None
        module, _, attribute = entry.target.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def name_of(self, target: object) -> str:
        """The name under which the class or function ``target`` is listed."""
        where = f"{getattr(target, '__module__', '')}:{getattr(target, '__qualname__', '')}"
        for name, entry in self.items():
            if entry.target == where:
                return name
        # A row may point at a re-export, so that only loading it can tell.
        for name in self:
            if self.load(name) is target:
                return name
        raise ValueError(f"{where} is in no row of the table of {self.table}s")

    def __getitem__(self, name: str) -> Entry:
        if name not in self._rows:
            self._read_plugins()
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        self._read_plugins()
        return iter(self._rows)

    def __len__(self) -> int:
        self._read_plugins()
        return len(self._rows)

    # A table is equal to itself only, and so may stand in an annotation.
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def _read_plugins(self) -> None:
        if self._plugins_read:
            return
        self._plugins_read = True
        for point in entry_points(group=f"expunge.{self.table}"):
            origin = point.dist.name if point.dist else "another distribution"
            if point.name in self._rows:
                raise UserError(
                    f"got a second {self.table} {point.name!r} from {origin}; allowed: one per "
                    f"name; uninstall {origin} or rename its entry point"
                )
            self.add(point.name, Entry(point.value, f"from {origin}"))


def _refuse_second_copy(table: str) -> None:
    # From the clone's root `import train` works and would define every table a second time.
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    scope: dict[str, Any] = frame.f_globals if frame is not None else vars(sys.modules["__main__"])
    module, file = str(scope.get("__name__")), os.path.realpath(str(scope.get("__file__")))
    first = _defined.setdefault((table, file), module)
    if first != module and "__main__" not in (first, module):
        raise ImportError(
            f"{file} was imported as {first} and again as {module}: import it as expunge.… only"
        )
