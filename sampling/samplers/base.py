"""What every sampler is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from expunge.concepts import Concept
from expunge.errors import UserError


class Sampler(ABC):
    """Settings of one way to sample: a frozen dataclass, listed in the table.

    Its module is imported when a configuration is read, and so must not import torch at its top.

    Attributes:
        needs_concept: Whether it must be told what is to be gone.
    """

    needs_concept: ClassVar[bool] = True

    @abstractmethod
    def wrap(self, pipeline: Any, concept: Concept | None) -> Any:
        """A copy of a diffusers pipeline that samples in this way; the original stays as it is.

        Raises:
            UserError: There is no concept where one is needed, or the pipeline does not fit.
        """

    def identity(self, pipeline: Any, concept: Concept | None) -> dict[str, Any]:
        """What determines its pictures besides its own fields, the model and the concept.

        Returns:
            JSON values: above all the hashes of weights that its fields only name.
        """
        return {}

    def require(self, concept: Concept | None) -> Concept:
        """The concept; a sampler without the one it needs is an error, not a plain sampler."""
        if concept is None:
            raise no_concept(self)
        return concept


def no_concept(sampler: Sampler) -> UserError:
    """The error of a sampler that is not told what is to be gone."""
    from expunge.sampling.samplers import SAMPLERS

    return UserError(
        f"got no concept for sampler {SAMPLERS.name_of(type(sampler))}; allowed: what is to be "
        'gone, in words; say --concept "a bomb"'
    )


def joined(concept: Concept) -> str:
    """All targets as one text, separated by commas."""
    return ", ".join(concept.targets)
