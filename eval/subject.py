"""What is under evaluation: a model with LoRA and soft tokens, and what is to be gone from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from expunge.errors import UserError
from expunge.results import sha256_file

if TYPE_CHECKING:
    from expunge.eval.store import ImageStore

REPEAT = "may be repeated"
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What `expunge eval` and `expunge attack` are both told; each adds what it does with it.

    What has no help here has that of the command.
    """

    output_dir: Path
    suite: str
    model: str = field(default="emoji", metadata={"help": "emoji, a folder or a hub id"})
    lora: list[str] = field(
        default_factory=list,
        metadata={"help": f"a LoRA's folder or file; {REPEAT}", "repeat": True},
    )
    lora_scale: float = field(default=1.0, metadata={"help": "strength of every LoRA"})
    tokens: list[str] = field(
        default_factory=list,
        metadata={"help": f"file of a soft token that prompts name; {REPEAT}", "repeat": True},
    )
    concept: list[str]
    limit: int | None = None
    batch_size: int = 16
    store: Path | None = field(
        default=None,
        metadata={"help": "folder of pictures that runs share; default: OUTPUT_DIR/images"},
    )
    device: Device = "auto"
    overwrite: bool = False

    positive: ClassVar[tuple[str, ...]] = ("batch_size",)
    """The fields that must be 1 or more."""

    def __post_init__(self) -> None:
        for name in self.positive:
            if getattr(self, name) < 1:
                raise UserError(f"got {name} {getattr(self, name)}; allowed: a positive number")

    def concept_texts(self) -> list[str]:
        """The texts of the concept: those that were given, else those of the LoRA.

        Raises:
            UserError: Neither says one.
        """
        if self.concept:
            return list(self.concept)
        if not self.lora:
            raise UserError(
                "got neither --concept nor --lora; allowed: a concept to look for; say for example "
                "--concept bomb"
            )
        from expunge.adapters import read_metadata

        texts: list[str] = []
        for lora in self.lora:
            found = read_metadata(lora).get("concept", {})
            targets = found.get("targets") or [found[key] for key in ("name",) if key in found]
            if not targets:
                raise UserError(
                    f"got LoRA {lora}, which does not say what it erases; allowed: one that "
                    "expunge wrote, or any with --concept; say for example --concept bomb"
                )
            texts += [text for text in targets if text not in texts]
        return texts

    def trainings(self) -> dict[str, dict[str, Any]]:
        """What each of its LoRA says of itself."""
        from expunge.adapters import read_metadata

        return {lora: read_metadata(lora) for lora in self.lora}

    def adapters(self) -> list[dict[str, Any]]:
        """What a pipeline's state does not tell of its adapters."""
        from expunge.adapters import locate

        files = [locate(lora) for lora in self.lora]
        return [{"sha256": sha256_file(file), "scale": self.lora_scale} for file in files]

    def weights(self) -> dict[str, Any]:
        """What tells its weights from others', as far as it is known before they are loaded."""
        from expunge import soft_tokens

        return {
            "adapters": self.adapters(),
            "tokens": [sha256_file(soft_tokens.locate(file)) for file in self.tokens],
        }

    def load(self, *, erased: bool, model: str | None = None) -> Any:
        """The pipeline, where the command is told to run it.

        Args:
            erased: With its LoRA; else what it was before.
            model: Another model in its place.
        """
        from expunge.backbones import device_of
        from expunge.sampling.load import load_model

        return load_model(
            model or self.model,
            self.lora if erased else [],
            self.lora_scale,
            device=device_of(self.device),
            tokens=self.tokens,
        )

    def images(self) -> ImageStore:
        """The store of its pictures."""
        from expunge.eval.store import ImageStore

        return ImageStore(self.store or self.output_dir / "images")
