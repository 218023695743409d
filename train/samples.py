"""Sheets of pictures: each prompt's of the base above those of what became of it, seed by seed."""

from pathlib import Path
from typing import Any

from PIL import Image

from expunge import adapters, backbones, pictures
from expunge.generation import generate
from expunge.train.config import TrainConfig


class Samples:
    """Draws `<folder>/samples/step-000050.png`; what the base draws is drawn once.

    Args:
        config: The run.
        pipeline: The model; its UNet carries the adapter by the time of the first sheet.
        folder: The run's.
    """

    def __init__(self, config: TrainConfig, pipeline: Any, folder: Path) -> None:
        concept, choice = config.concept, config.validation
        self.pipeline, self.folder, self.choice = pipeline, folder / "samples", choice
        self.prompts = choice.prompts or [*concept.prompts()[:3], *concept.retained()[:3]]
        given, usual = choice.guidance_scale, backbones.recommended_guidance(config.model)
        self.guidance_scale = usual if given is None else given
        self._before: list[list[Image.Image]] = []

    def draw(self, step: int) -> Image.Image:
        """The sheet after `step` steps, which is also written."""
        if not self._before:
            with adapters.teacher(self.pipeline.unet):
                self._before = self._rows()
        both = zip(self._before, self._rows(), strict=True)
        labels = [f"{when}: {prompt}" for prompt in self.prompts for when in ("before", "after")]
        sheet = pictures.sheet([row for pair in both for row in pair], labels)
        self.folder.mkdir(exist_ok=True)
        pictures.save_png(sheet, self.folder / f"step-{step:06d}.png")
        return sheet

    def _rows(self) -> list[list[Image.Image]]:
        """A row for each prompt, a picture for each seed, by the network as it is now."""
        seeds = range(self.choice.seeds)
        images = generate(
            self.pipeline,
            [prompt for prompt in self.prompts for _ in seeds],
            [*seeds] * len(self.prompts),
            steps=self.choice.steps,
            guidance_scale=self.guidance_scale,
        )
        return [[pictures.to_pil(image) for image in part] for part in images.split(len(seeds))]
