"""A plain Python function as a density."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from expunge.densities.base import HarmDensity
from expunge.densities.thresholds import check_threshold, spread_threshold
from expunge.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.concepts import Concept


@dataclass(frozen=True)
class FromCallable:
    """p_h(x) = f(x) for a Python function f of pictures (B, 3, H, W) in [-1, 1].

    Attributes:
        function: Where it is, `module:function`; it returns (B,) or (B, M).
        names: The concepts; one by the function's name when empty.
        threshold: η: one for all concepts, or one for each.
        span: The least and the greatest value of a score.
    """

    function: str
    names: list[str] = field(default_factory=list)
    threshold: float | list[float] = 0.5
    span: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        module, colon, name = self.function.partition(":")
        if not (module and colon and name):
            raise ValueError(f"got function {self.function!r}; allowed: module:function")
        if not self.span[0] < self.span[1]:
            raise ValueError(f"got span {self.span}; allowed: a lower number and a higher one")
        check_threshold(self.threshold, *self.span)

    def build(self, concept: Concept | None = None, device: Any = "cpu") -> HarmDensity:
        """The density of the function.

        Raises:
            UserError: There is no such function, or not one threshold for each concept.
        """
        module, _, name = self.function.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"got function {self.function}, which cannot be imported ({error}); allowed: "
                "module:function of an installed module"
            ) from error
        if not callable(function):
            raise UserError(f"got {self.function}, which is no function; allowed: a function")
        density = from_callable(function, self.names or [name], self.threshold, self.span)
        return density.to(device)


def from_callable(
    function: Callable[[Tensor], Tensor],
    names: Sequence[str] = ("harm",),
    threshold: float | Sequence[float] = 0.5,
    span: tuple[float, float] = (0.0, 1.0),
    resolution: int | None = None,
) -> HarmDensity:
    """A density that calls `function` on pictures (B, 3, H, W) in [-1, 1].

    Args:
        function: Returns (B, M), or (B,) for one concept. To guide a sampler it must be
            differentiable; to gate one it need not be.
        names: The M concepts.
        threshold: η: one for all concepts, or one for each.
        span: The least and the greatest value of a score.
        resolution: Side in pixels of what it looks at; None when it takes any size.
    """
    check_threshold(threshold, *span)
    return Called(function, list(names), spread_threshold(threshold, names), span, resolution)


class Called(HarmDensity):
    """A function's scores."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        names: list[str],
        thresholds: Tensor,
        span: tuple[float, float],
        resolution: int | None,
    ) -> None:
        self.function, self.names, self.thresholds = function, names, thresholds
        self.span, self.resolution = span, resolution

    def per_concept(self, images: Tensor) -> Tensor:
        """What the function says, (B, M)."""
        scores = self.function(images)
        return scores[:, None] if scores.ndim == 1 else scores

    def identity(self) -> dict[str, Any]:
        """The function's name and the hash of its source; what it calls is the caller's affair.

        Raises:
            UserError: Its source cannot be read, so that nothing tells it from a namesake.
        """
        f = self.function
        code = f if inspect.isroutine(f) else type(f)
        name = f"{getattr(f, '__module__', '')}:{getattr(f, '__qualname__', type(f).__qualname__)}"
        try:
            source = inspect.getsource(code)
        except (OSError, TypeError) as error:
            raise UserError(
                f"got function {name}, whose source cannot be read, so that nothing tells it from "
                "another of its name; allowed: a Python function in a file; wrap it in one"
            ) from error
        digest = hashlib.sha256(source.encode()).hexdigest()
        return {**super().identity(), "function": name, "source": digest}
