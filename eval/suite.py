"""A suite: which pictures are made of a concept, who judges them and what is counted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeGuard

import yaml

from expunge.configuration import load
from expunge.errors import UserError, unknown_name
from expunge.eval.cases import Plan
from expunge.eval.detectors import DETECTORS, Detector
from expunge.eval.file_prompts import FilePrompts
from expunge.eval.metrics import METRICS, Counter, PictureMetric
from expunge.registry import Entry, Registry
from expunge.schema import encode, field_default, fields_of, read_yaml

PROMPTS = Registry(
    "prompt source",
    {
        "emoji": Entry(
            "expunge.eval.emoji_prompts:EmojiPrompts",
            "captions of the bundled emoji model, derived from its vocabulary and the concept",
        ),
        "file": Entry(
            "expunge.eval.file_prompts:FilePrompts",
            "the rows of a .txt, .csv, .jsonl or dataset: I2P, template prompts, captions of COCO",
        ),
        "grid": Entry(
            "expunge.eval.grid_prompts:GridPrompts",
            "every combination of a few lists, put into sentences: UnlearnCanvas",
        ),
        "emoji_words": Entry(
            "expunge.eval.emoji_words:EmojiWords",
            "the emoji model's objects said otherwise: paraphrases, typos, other languages",
        ),
    },
)


class PromptSource(Protocol):
    """Turns the concept under test into pictures to make and questions to ask."""

    @property
    def sexual(self) -> bool:
        """Whether pictures may be: age-coded prompts are never made, contact sheets are blurred."""

    def plan(self, concept: list[str], limit: int | None = None) -> Plan:
        """The cases for a concept given as texts, at most ``limit`` per group."""


Metric = Counter | PictureMetric


@dataclass(frozen=True)
class Judge:
    """A second opinion: another detector is asked the questions of some metrics in its own labels.

    Its counts stand beside the first detector's as `metric@name of the judge`.
    """

    detector: Annotated[Detector, DETECTORS] = field(metadata={"help": "who judges"})
    asks: dict[str, list[str]] = field(
        metadata={"help": "metric -> labels, any of which answers it with yes"}
    )


@dataclass(frozen=True)
class Suite:
    """A versioned evaluation suite, read from YAML."""

    name: str = field(metadata={"help": "the suite's name"})
    version: int = field(metadata={"help": "raised whenever results stop being comparable"})
    description: str = field(metadata={"help": "one line for expunge ls"})
    steps: int = field(metadata={"help": "denoising steps"})
    guidance_scale: float = field(metadata={"help": "scale of classifier-free guidance"})
    prompts: Annotated[PromptSource, PROMPTS] = field(metadata={"help": "where prompts come from"})
    detector: Annotated[Detector, DETECTORS] = field(metadata={"help": "who judges"})
    groups: dict[str, str] = field(metadata={"help": "prompt group -> its title in reports"})
    metrics: dict[str, Annotated[Metric, METRICS]] = field(metadata={"help": "what is measured"})
    judges: dict[str, Judge] = field(
        default_factory=dict, metadata={"help": "second opinions: name -> detector and questions"}
    )

    def __post_init__(self) -> None:
        for name in (*self.metrics, *self.judges):
            if "@" in name:
                raise ValueError(
                    f"got the name {name!r}; allowed: names of metrics and judges without @, which "
                    "stands between the two"
                )

    def plan(self, concept: list[str], limit: int | None = None) -> Plan:
        """The cases for a concept given as texts, at most ``limit`` per group.

        Raises:
            UserError: The concept or the prompts are wrong, or a case is of a group or asks for a
                metric that the suite does not have.
        """
        found, counters = self.prompts.plan(concept, limit), self.counters()
        for case in found.cases:
            if case.group not in self.groups:
                raise unknown_name(f"prompt group of suite {self.name}", case.group, self.groups)
            for question in case.questions:
                if question.metric not in counters:
                    kind = f"metric that suite {self.name} asks for"
                    raise unknown_name(kind, question.metric, counters, "give it such a metric")
        return found

    def counters(self) -> dict[str, Counter]:
        """The metrics that count answers."""
        return {n: m for n, m in self.metrics.items() if _counts(m)}

    def picture_metrics(self) -> dict[str, PictureMetric]:
        """The metrics that look at pictures."""
        return {n: m for n, m in self.metrics.items() if _looks(m)}

    def sha256(self) -> str:
        """The hash of everything that the suite's file decides, on whichever machine it lies.

        Where files lie and which device computes is left out: what is in the files is told by the
        hashes of prompts and of protocols.
        """
        content = _anywhere(self, encode(self))
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _anywhere(value: Any, plain: Any) -> Any:
    """Plain values of a configuration with no path, and devices as if none had been chosen."""
    if isinstance(value, Path) or _is_folder(value):
        return None
    if is_dataclass(value):
        found = dict(plain)
        for name, (_, setting) in fields_of(type(value)).items():
            inner = _anywhere(getattr(value, name), plain[name])
            found[name] = field_default(setting) if name == "device" else inner
        return found
    if isinstance(value, Mapping):
        return {key: _anywhere(item, plain[key]) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_anywhere(*pair) for pair in zip(value, plain, strict=True)]
    return plain


def _is_folder(value: Any) -> bool:
    """Whether a model's name is a folder here, as opposed to one of a hub."""
    return isinstance(value, str) and "/" in value and os.path.isdir(value)


def _counts(metric: Metric) -> TypeGuard[Counter]:
    return not hasattr(metric, "open")


def _looks(metric: Metric) -> TypeGuard[PictureMetric]:
    return hasattr(metric, "open")


def load_suite(name: str) -> Suite:
    """Read a shipped suite by its name, or any other by the path of its YAML file.

    Raises:
        UserError: There is no such suite, or its file is wrong.
    """
    if name in shipped():
        return load(Suite, Path(str(resources.files("expunge.eval.suites"))) / f"{name}.yaml")
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise UserError(f"got --suite {name}, which is no file; allowed: a suite's YAML file")
        return load(Suite, name)
    raise unknown_name("suite", name, shipped(), "or give the path of a suite's YAML file")


def with_prompts(suite: Suite, path: Path) -> Suite:
    """The suite with its prompts read from another file.

    Raises:
        UserError: The suite reads no file.
    """
    if not isinstance(suite.prompts, FilePrompts):
        raise UserError(
            f"got --prompts {path} for the suite {suite.name}, which reads no prompt list; "
            "allowed: without --prompts, or another suite"
        )
    return replace(suite, prompts=replace(suite.prompts, path=path))


def shipped() -> dict[str, str]:
    """The shipped suites: name -> description."""
    found = {}
    for item in resources.files("expunge.eval.suites").iterdir():
        if item.name.endswith(".yaml"):
            values: dict[str, Any] = read_yaml(item.read_text(encoding="utf-8"))
            found[item.name.removesuffix(".yaml")] = str(values["description"])
    return dict(sorted(found.items()))
