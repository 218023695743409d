"""`expunge calibrate`: what a density says of harmless pictures, for `calibrated` to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from expunge.concepts import Concept
from expunge.configuration import parse
from expunge.densities import DENSITIES
from expunge.densities.base import DensityConfig
from expunge.densities.clip_text import ClipText
from expunge.densities.reference import LEAST, Reference
from expunge.errors import UserError
from expunge.sampling.drawing import Drawing

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.densities.base import HarmDensity

# The default threshold of `calibrated`, 0.99, takes as many.
ENOUGH = 200


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(Drawing):
    """What `expunge calibrate` makes."""

    output: str = field(metadata={"help": "the calibration file (.json)"})
    density: Annotated[DensityConfig, DENSITIES] = field(
        default_factory=ClipText, metadata={"help": "the density to be put on the scale"}
    )
    concept: Concept | None = field(
        default=None, metadata={"help": "what it sees, if the density does not say it itself"}
    )
    images: str | None = field(
        default=None, metadata={"help": "a folder of harmless pictures; or:"}
    )
    prompt: list[str] = field(
        default_factory=list,
        metadata={"help": "harmless prompts that a model draws; may be repeated", "repeat": True},
    )
    prompts_file: str | None = field(
        default=None, metadata={"help": "a text file of harmless prompts, one per line"}
    )
    at: Literal["steps", "end"] = field(
        default="steps",
        metadata={"help": "what is scored of a drawn picture: the x̂0 of all steps, or its end"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at == "steps" and self.steps < 2:
            raise ValueError("got steps 1 at steps; allowed: 2 or more, or --at end")
        if not self.output.endswith(".json"):
            raise ValueError(f"got output {self.output}; allowed: a name that ends in .json")
        if (self.images is None) == (not self.prompt and self.prompts_file is None):
            raise ValueError(
                "got a folder of images and prompts, or neither; allowed: one of them; say "
                "--images FOLDER, or --prompt 'a cat face' or --prompts_file FILE"
            )


def main(argv: list[str]) -> None:
    """Score harmless pictures, write the file, print what thresholds mean on them."""
    config = parse(CalibrateConfig, argv, "expunge calibrate")
    output = Path(config.output)
    if output.exists() and not config.overwrite:
        raise UserError(
            f"got output {output}, which exists; choose another name, or say --overwrite"
        )
    prompts = _prompts(config)
    # torch is imported late so that --help and mistakes answer at once.
    import torch

    from expunge import backbones
    from expunge.densities.calibrated import NEEDED
    from expunge.results import provenance
    from expunge.schema import encode

    device = backbones.device_of(config.device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"got device {device!r}, which cannot be used ({str(error).splitlines()[0]}); allowed: "
            "cpu, cuda, mps, as far as this machine has them"
        ) from error
    density = config.density.build(config.concept, device)
    identity = density.identity()  # what has none is refused before anything is scored
    _refuse_harmful(prompts, density)
    with torch.no_grad():
        if config.images is not None:
            pictures, source = _stored(config.images, config.batch_size)
            # Through the density's own call, which refuses NaN.
            parts = [density(part.to(device)).per_concept for part in pictures]
        else:
            drawn, source = _drawn(config, prompts, density, device)
            parts = list(drawn)
    scores = torch.cat([part.float().cpu() for part in parts]).T.sort(dim=1).values
    if scores.shape[1] < LEAST:
        raise UserError(
            f"got {scores.shape[1]} harmless pictures; allowed: {LEAST} or more, better hundreds"
        )
    hint = Annotated[DensityConfig, DENSITIES]
    reference = Reference(
        density.names,
        scores.tolist(),
        encode(config.density, hint),
        identity,
        {"source": source, "seed": config.seed, "provenance": provenance()},
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        reference.write(output)
    except OSError as error:
        raise UserError(
            f"got output {output}; allowed: a file that can be written; {error.strerror}"
        ) from error
    _report(density, scores)
    if reference.n < ENOUGH:
        most = 1 - NEEDED / reference.n
        print(f"only {reference.n} pictures: no threshold above {most:.3g} can be used with them")
    print(f"{reference.n} pictures, {len(density.names)} concepts in {output}")


def _prompts(config: CalibrateConfig) -> list[str]:
    prompts = list(config.prompt)
    if config.prompts_file is not None:
        try:
            text = Path(config.prompts_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"got prompts_file {config.prompts_file}; allowed: a readable text file; {error}"
            ) from None
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if config.images is None and not prompts:
        raise UserError(f"got no prompt in {config.prompts_file}; allowed: one per line")
    return prompts


def _refuse_harmful(prompts: Sequence[str], density: HarmDensity) -> None:
    """What shows the concept is no reference for what does not."""
    concept = Concept(targets=list(density.names))
    if harmful := [prompt for prompt in prompts if concept.mentioned_in(prompt)]:
        raise UserError(
            f"got {harmful[0]!r} among the harmless prompts, which names the concept; allowed: "
            "prompts without it; remove it"
        )


def _stored(folder: str, batch_size: int) -> tuple[Iterator[Tensor], dict[str, Any]]:
    import torch

    from expunge.pictures import picture_files, read_picture
    from expunge.results import sha256_folder

    files = picture_files(folder)
    source = {"images": folder, "sha256": sha256_folder(folder)}

    def read() -> Iterator[Tensor]:
        batch: list[Tensor] = []
        for picture in map(read_picture, files):
            # Pictures of one size go together.
            if batch and (picture.shape != batch[0].shape or len(batch) == batch_size):
                yield torch.stack(batch)
                batch = []
            batch.append(picture)
        yield torch.stack(batch)

    return read(), source


def _drawn(
    config: CalibrateConfig, prompts: Sequence[str], density: HarmDensity, device: str
) -> tuple[Iterator[Tensor], dict[str, Any]]:
    """Scores (B, M) of batches of pictures that the model draws."""
    from expunge import backbones
    from expunge.generation import generate
    from expunge.sampling.correction import Correction
    from expunge.sampling.guard import guard
    from expunge.sampling.most import Most

    guidance = config.guidance_scale
    if guidance is None:
        guidance = backbones.recommended_guidance(config.model)
    pipeline = backbones.load_pipeline(config.model, device=device)
    jobs = [(p, config.seed + i) for p in prompts for i in range(config.images_per_prompt)]
    source = {
        "model": config.model,
        "prompts": list(prompts),
        "images_per_prompt": config.images_per_prompt,
        "at": config.at,
        "steps": config.steps,
        "guidance_scale": guidance,
    }
    most = Most(density)
    if config.at == "steps":
        # A guard that looks, with its own decoder and from its own first step on, and never acts.
        idle = Correction(direction="gradient", strength=0.0)
        pipeline = guard(pipeline, most, how=idle)

    def draw() -> Iterator[Tensor]:
        from tqdm import tqdm

        with tqdm(total=len(jobs), unit="image", disable=None) as bar:
            for start in range(0, len(jobs), config.batch_size):
                part = jobs[start : start + config.batch_size]
                most.forget()
                pictures = generate(
                    pipeline,
                    [prompt for prompt, _ in part],
                    [seed for _, seed in part],
                    steps=config.steps,
                    guidance_scale=guidance,
                    batch_size=config.batch_size,
                )
                if config.at == "end":
                    most(pictures.to(device))
                yield most.scores
                bar.update(len(part))

    return draw(), source


def _report(density: HarmDensity, scores: Tensor) -> None:
    """What the raw scores are on harmless pictures, and how often the raw threshold fires there."""
    from rich.console import Console
    from rich.table import Table

    table = Table("concept", "mean", "deviation", "99 %", "η", "fires at η", box=None)
    for name, row, η in zip(density.names, scores, density.thresholds.cpu(), strict=True):
        cells = (row.mean(), row.std(), row.quantile(0.99), η)
        share = (row >= η).float().mean()
        table.add_row(name, *(f"{cell:.3f}" for cell in cells), f"{share:.1%}")
    Console().print(table)
