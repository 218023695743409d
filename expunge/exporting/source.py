"""The LoRA files that go into an export: what they say of themselves, and of their base."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge import adapters, backbones
from expunge.errors import UserError
from expunge.results import sha256_file

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Source:
    """A LoRA file.

    Attributes:
        file: Where it is.
        sha256: Of its bytes.
        about: What expunge wrote in it; empty for a file of others.
    """

    file: Path
    sha256: str
    about: dict[str, Any]

    @property
    def concept(self) -> str:
        """The name of what it erases."""
        return str(self.details.get("name") or self.file.stem)

    @property
    def targets(self) -> list[str]:
        """The texts that it erases, if it says which."""
        targets = self.details.get("targets")
        return [str(target) for target in targets] if isinstance(targets, list) else []

    @property
    def objective(self) -> str:
        """How it was trained."""
        return str(self.about.get("objective") or UNKNOWN)

    @property
    def model(self) -> str | None:
        """What it was trained on."""
        return str(self.about["model"]) if self.about.get("model") else None

    @property
    def base_sha256(self) -> str | None:
        """Of the folder that it was trained on; None for a model of the hub."""
        return str(self.about["base_sha256"]) if self.about.get("base_sha256") else None

    @property
    def details(self) -> dict[str, Any]:
        """All that it says of its concept."""
        concept = self.about.get("concept")
        return concept if isinstance(concept, dict) else {}


def read(loras: list[str]) -> list[Source]:
    """Read what LoRA files say of themselves.

    Raises:
        UserError: One is missing or broken, or there twice.
    """
    found: dict[str, Source] = {}
    for lora in loras:
        about, file = adapters.read_metadata(lora), adapters.locate(lora)
        digest = sha256_file(file)
        if digest in found:
            raise UserError(
                f"got LoRA {file}, the same as {found[digest].file}; allowed: each once; for more "
                "strength say --lora_scale"
            )
        found[digest] = Source(file, digest, about)
    return list(found.values())


def choose_model(model: str | None, sources: list[Source]) -> str:
    """The model that is asked for, or the one that all LoRA say they were trained on.

    Raises:
        UserError: They name none, or not the same.
    """
    if model is not None:
        return model
    recorded = {source.model for source in sources}
    (first, *others) = recorded
    if others:
        names = ", ".join(sorted(str(name) for name in recorded))
        raise UserError(f"got LoRA of several models ({names}); allowed: of one; say --model")
    if first is None:
        raise UserError(
            f"got LoRA {sources[0].file}, which does not say what it was trained on; "
            "say --model with that model"
        )
    try:
        backbones.resolve(first)
    except UserError as error:
        raise UserError(f"{error}; it is what the LoRA names; say --model") from error
    return first


def strangers(sources: list[Source], base_sha256: str | None) -> list[Source]:
    """The LoRA that were trained on another base than the one whose hash this is."""
    if base_sha256 is None:
        return []
    return [s for s in sources if s.base_sha256 is not None and s.base_sha256 != base_sha256]


def public_name(model: str) -> str:
    """What a published file may say of its base: no folder of this machine."""
    return Path(model).absolute().name if Path(model).is_dir() else model


def about(sources: list[Source], model: str, base_sha256: str | None) -> dict[str, Any]:
    """What the exported LoRA says of itself; of several, what each of them said."""
    base = {"model": public_name(model), "base_sha256": base_sha256}
    concept = {
        "name": " and ".join(source.concept for source in sources),
        "targets": [target for source in sources for target in source.targets],
    }
    objective = " + ".join(dict.fromkeys(source.objective for source in sources))
    said = {"concept": concept, "objective": objective} | base
    if len(sources) == 1:
        return sources[0].about | said | {"concept": sources[0].details | concept}
    parts = [source.about | {"sha256": source.sha256} | base for source in sources]
    return said | {"merged_from": parts}
