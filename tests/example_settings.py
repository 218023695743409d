"""A configuration with everything that one can hold: sections, choices, lists, text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from expunge.configuration import parse
from expunge.errors import UserError
from expunge.registry import Entry, Registry


@dataclass(frozen=True)
class Esd:
    negative_guidance: float = 1.0
    variant: Literal["x", "x-strict", "u"] = "x"


@dataclass(frozen=True)
class Sdd:
    ema_decay: float = 0.999
    negative_guidance: float = 3.0


METHODS = Registry(
    "method",
    {
        "esd": Entry(f"{__name__}:Esd", "negative guidance"),
        "sdd": Entry(f"{__name__}:Sdd", "self-distillation"),
    },
)


@dataclass(frozen=True)
class Nested:
    inner: Annotated[Any, METHODS] = field(default_factory=Esd)


@dataclass(frozen=True)
class Outer:
    outer: Annotated[
        Any, Registry("outer method", {"nested": Entry(f"{__name__}:Nested", "holds another")})
    ]


@dataclass(frozen=True)
class Lora:
    rank: int = 4
    alpha: float | None = None
    targets: tuple[str, ...] = ("attn2.to_k", "attn2.to_v")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"got lora.rank {self.rank}; allowed: 1 or more; raise it")


@dataclass
class Concept:
    name: str
    targets: tuple[str, ...] = ()
    images: Path | None = None
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a concept needs a name")


@dataclass(frozen=True)
class Config:
    concept: Concept
    objective: Annotated[Any, METHODS] = field(default_factory=lambda: Esd(variant="u"))
    other: Annotated[Any, METHODS] | None = None
    lora: Lora = field(default_factory=lambda: Lora(rank=8))
    output_dir: Path = Path("out")
    steps: int = field(default=100, metadata={"help": "updates of the weights"})
    learning_rate: float = 1e-3
    resume: bool = False
    size: tuple[int, int] = (64, 64)
    seed: int | Literal["random"] = 0
    note: str | None = None
    tags: list[str] = field(default_factory=list)
    prompts: tuple[str, ...] = field(default=("a bomb",), metadata={"repeat": True})
    seeds: list[int] = field(default_factory=list, metadata={"repeat": True})


def read(*argv: str, text: str | None = None, tmp_path: Path | None = None) -> Config:
    words = list(argv)
    if text is not None:
        assert tmp_path is not None
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        words = ["--config", str(path), *words]
    return parse(Config, words)


def named(*argv: str) -> Config:
    return read("--concept.name", "bomb", *argv)
