"""`expunge sample`: pictures of prompts, with or without LoRA, and what made them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from expunge.concepts import Concept
from expunge.configuration import parse
from expunge.errors import UserError
from expunge.sampling.drawing import Drawing
from expunge.sampling.samplers import SAMPLERS
from expunge.sampling.samplers.base import no_concept
from expunge.schema import encode

SAMPLES = "samples.json"


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Drawing):
    """What `expunge sample` makes."""

    output_dir: str = field(metadata={"help": "folder for the pictures"})
    prompt: list[str] = field(metadata={"help": "what to draw; may be repeated", "repeat": True})
    lora: list[str] = field(
        default_factory=list, metadata={"help": "LoRA folder or file", "repeat": True}
    )
    lora_scale: float = field(default=1.0, metadata={"help": "strength of every LoRA"})
    tokens: list[str] = field(
        default_factory=list,
        metadata={
            "help": "file of a soft token that prompts name; may be repeated",
            "repeat": True,
        },
    )
    sampler: Annotated[Any, SAMPLERS] = field(
        default_factory=lambda: SAMPLERS.load("plain")(), metadata={"help": "how to sample"}
    )
    concept: list[str] = field(
        default_factory=list,
        metadata={"help": "what is to be gone, for the sampler; may be repeated", "repeat": True},
    )
    plot: bool = field(
        default=False, metadata={"help": "draw what a guard saw in every step, trace.png"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt:
            raise ValueError("got no prompt; say --prompt 'a cat face'")
        if self.sampler.needs_concept and not self.concept:
            raise no_concept(self.sampler)


def main(argv: list[str]) -> None:
    """Sample, and write the pictures, `grid.png` and `samples.json`."""
    config = parse(SampleConfig, argv, "expunge sample")
    concept = Concept(targets=config.concept) if config.concept else None
    # torch is imported late so that --help and mistakes answer at once.
    import time

    from tqdm import tqdm

    from expunge import backbones, pictures, soft_tokens
    from expunge.generation import generate
    from expunge.results import fresh_output_dir, provenance, write_json_atomic
    from expunge.sampling.guard_trace import draw
    from expunge.sampling.load import load_model

    folder = Path(config.output_dir)
    if config.overwrite and not (folder / SAMPLES).is_file():
        # A training's folder carries expunge's marker too; only pictures make way for pictures.
        fresh_output_dir(folder, dry_run=True)
    fresh_output_dir(folder, config.overwrite, dry_run=True)
    device = backbones.device_of(config.device)
    guidance = config.guidance_scale
    if guidance is None:
        guidance = backbones.recommended_guidance(config.model)
    pipeline = load_model(
        config.model, config.lora, config.lora_scale, device=device, tokens=config.tokens
    )
    soft_tokens.require(pipeline, [*config.prompt, *config.concept])
    pipeline = config.sampler.wrap(pipeline, concept)
    if config.plot and not hasattr(pipeline, "trace"):
        raise UserError(
            "got plot for a sampler that asks no density; allowed: safe, published; remove --plot"
        )
    fresh_output_dir(folder, config.overwrite)
    rows, records = [], []
    jobs = [(p, config.seed + i) for p in config.prompt for i in range(config.images_per_prompt)]
    with tqdm(total=len(jobs), unit="image", disable=None) as bar:
        for start in range(0, len(jobs), config.batch_size):
            part = jobs[start : start + config.batch_size]
            begun = time.perf_counter()
            images = generate(
                pipeline,
                [prompt for prompt, _ in part],
                [seed for _, seed in part],
                steps=config.steps,
                guidance_scale=guidance,
                batch_size=config.batch_size,
            )
            seconds = (time.perf_counter() - begun) / len(part)
            trace = getattr(pipeline, "trace", None)
            for index, ((prompt, seed), image) in enumerate(zip(part, images, strict=True)):
                name = f"{start + index:04d}-seed-{seed}.png"
                rows.append(pictures.to_pil(image))
                pictures.save_png(rows[-1], folder / name)
                about = {"file": name, "prompt": prompt, "seed": seed, "seconds": seconds}
                records.append(about if trace is None else about | trace.of(index))
            bar.update(len(part))
    n = config.images_per_prompt
    grid = [rows[i : i + n] for i in range(0, len(rows), n)]
    pictures.save_png(pictures.sheet(grid, config.prompt), folder / "grid.png")
    if config.plot:
        draw(records, pipeline.thresholds, folder / "trace.png")
    write_json_atomic(
        folder / SAMPLES,
        {
            "model": config.model,
            "lora": config.lora,
            "lora_scale": config.lora_scale,
            "tokens": config.tokens,
            "sampler": encode(config.sampler, Annotated[Any, SAMPLERS]),
            "concept": config.concept,
            "steps": config.steps,
            "guidance_scale": guidance,
            "images": records,
            "provenance": provenance(),
        },
    )
    if withheld := sum(bool(record.get("withheld")) for record in records):
        print(f"{withheld} of {len(rows)} pictures still showed the concept: withheld, left black")
    print(f"{len(rows)} pictures in {folder}; all at once: {folder / 'grid.png'}")
