"""Give one object a further behaviour; its class, its name in files and the original stay."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from expunge.errors import UserError

T = TypeVar("T")


def graft(instance: T, mixin: type) -> T:
    """A shallow copy of an object whose methods are looked up in `mixin` first.

    The copy shares everything that the object holds (weights above all); the object itself stays
    as it was. diffusers saves pipelines and schedulers under the name of their class, so the copy's
    class bears the same name and module, and what it saves loads as what it was.

    Args:
        instance: A pipeline or a scheduler, possibly grafted already.
        mixin: A class without instance layout of its own; its methods may call `super()`.

    Raises:
        UserError: The object has this behaviour already.
    """
    if isinstance(instance, mixin):
        raise UserError(
            f"got a {type(instance).__name__} that is {mixin.__name__} already; allowed: once; "
            "wrap the original"
        )
    grafted = copy.copy(instance)
    cls = type(instance)
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    # Past the object's own __setattr__: diffusers' pipelines watch theirs.
    object.__setattr__(grafted, "__class__", type(cls.__name__, (mixin, cls), members))
    return grafted
