"""`expunge export`: LoRA files and merged weights for elsewhere, read back before they are kept."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expunge.configuration import parse
from expunge.errors import UserError

if TYPE_CHECKING:
    from expunge.exporting.source import Source

RESULT = "export.json"
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What `expunge export` makes."""

    output_dir: str = field(metadata={"help": "folder for the files"})
    lora: list[str] = field(
        metadata={"help": "LoRA folder or file; several are added up", "repeat": True}
    )
    to: Literal["diffusers", "kohya", "merged"] = field(
        metadata={"help": "LoRA for diffusers; LoRA for A1111, ComfyUI; the model with W + ΔW"}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "emoji, a diffusers folder, a hub id; default: what the LoRA names"},
    )
    lora_scale: float = field(default=1.0, metadata={"help": "strength of every LoRA"})
    combine: Literal["sum", "svd"] = field(
        default="sum",
        metadata={"help": "sum is exact, and ranks add up; svd cuts the sum to a rank"},
    )
    rank: int | None = field(
        default=None, metadata={"help": "for svd; default: the highest of the LoRA"}
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = field(
        default="auto", metadata={"help": "of the weights; auto rounds nothing"}
    )
    part: Literal["pipeline", "unet"] = field(
        default="pipeline", metadata={"help": "for merged: the whole model, or its UNet alone"}
    )
    name: str | None = field(
        default=None, metadata={"help": "for kohya: the file's name; default: after the concept"}
    )
    steps: int = field(default=4, metadata={"help": "denoising steps of the comparison"})
    seed: int = field(default=0, metadata={"help": "of the comparison"})
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.lora:
            raise ValueError("got no lora; say --lora out/bomb")
        if not 1 <= self.steps <= 1000:  # as many as a model was trained with
            raise ValueError(f"got steps {self.steps}; allowed: 1 to 1000")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"got seed {self.seed}; allowed: 0 to 2⁶³ − 1")
        if self.rank is not None and (self.rank < 1 or self.combine != "svd"):
            raise ValueError(f"got rank {self.rank}; allowed: 1 or more, with --combine svd")
        if self.part != "pipeline" and self.to != "merged":
            raise ValueError(f"got part {self.part} with to {self.to}; allowed: with merged")
        if self.name is not None and self.to != "kohya":
            raise ValueError(f"got name {self.name} with to {self.to}; allowed: with kohya")
        if self.name is not None and not re.fullmatch(r"\w[\w. -]*", self.name):
            raise ValueError(
                f"got name {self.name!r}; allowed: letters, digits, blanks and _ - . in it"
            )


def main(argv: list[str]) -> None:
    """Export, read back, compare, and only then give the files their place."""
    config = parse(ExportConfig, argv, "expunge export")
    # torch is imported late so that --help and mistakes answer at once.
    import shutil
    import tempfile

    from expunge import backbones
    from expunge.exporting import source
    from expunge.exporting.card import model_card
    from expunge.exporting.export import Export
    from expunge.results import (
        fresh_output_dir,
        sha256_folder,
        write_json_atomic,
        write_text_atomic,
    )

    folder = Path(config.output_dir)
    if config.overwrite and not (folder / RESULT).is_file():
        # A training's folder carries expunge's marker too; only an export makes way for an export.
        fresh_output_dir(folder, dry_run=True)
    fresh_output_dir(folder, config.overwrite, dry_run=True)
    sources = source.read(config.lora)
    model = source.choose_model(config.model, sources)
    where = Path(backbones.resolve(model))
    _refuse_inputs_in(folder, [where, *(s.file for s in sources)])
    base_sha256 = sha256_folder(where) if where.is_dir() else None
    _name_strangers(config, source.strangers(sources, base_sha256), model)

    export = Export(config, sources, model, base_sha256, backbones.device_of(config.device))
    # Beside its place, so that it can be renamed.
    beside = next(parent for parent in folder.absolute().parents if parent.is_dir())
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=beside))
    try:
        result = export.run(temporary)
        write_text_atomic(temporary / CARD, model_card(result, export.about))
        write_json_atomic(temporary / RESULT, result)
        fresh_output_dir(folder, config.overwrite)
        for item in temporary.iterdir():
            shutil.move(item, folder / item.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _tell(result, folder)


def _refuse_inputs_in(folder: Path, inputs: list[Path]) -> None:
    """Overwriting would delete what is to be exported."""
    for path in inputs:
        if folder.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(
                f"got output folder {folder}, which holds {path}; allowed: another folder than "
                "what is exported lies in"
            )


def _name_strangers(config: ExportConfig, strangers: list[Source], model: str) -> None:
    """A LoRA may be moved to another base of its kind; it must have been meant."""
    for stranger in strangers:
        told = f"{stranger.file} was trained on another base than {model} is now"
        if config.model is None:
            raise UserError(f"got LoRA {told}; allowed: its own; say --model if it is meant")
        print(f"expunge: note: {told}; it may erase less", file=sys.stderr)


def _tell(result: dict[str, Any], folder: Path) -> None:
    from expunge.exporting.card import combined

    for pair in result["interference"]["pairs"]:
        worst = pair["worst_layer"]
        print(
            f"{pair['one']} × {pair['other']}: cosine of ΔW {pair['cosine']:+.3f}, ‖sum‖ "
            f"{pair['norm_sum']:.3g} of {pair['norm_one']:.3g} and {pair['norm_other']:.3g}, in "
            f"{pair['shared_layers']} shared layers"
            + (f"; {pair['layers'][worst]['cosine']:+.3f} in {worst}" if worst else "")
        )
    for concept, share in zip(
        (row["concept"] for row in result["lora"]), result["interference"]["moved"], strict=False
    ):
        print(f"the others move what {concept} does on its own prompt by {share:.1%}")
    checked = result["verified"]
    print(
        f"read back with diffusers {result['provenance']['versions']['diffusers']}: latents of "
        f"{checked['steps']} steps from {len(checked['prompts'])} prompts differ from the LoRA in "
        f"place by {checked['difference']:.1e} of their scale (allowed {checked['allowed']:.1e}); "
        f"the LoRA changes them by {checked['effect']:.1e}"
    )
    print(f"{checked['tensors']} tensors are on the disk as they were meant, bit for bit")
    names = [name for name in result["files"] if name.endswith(".safetensors")]
    print(f"{result['to']} ({combined(result)}), {result['dtype']}: {', '.join(names)} in {folder}")
