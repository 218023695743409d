"""A density whose answer is known, and pictures of a pipeline that it may guard."""

import torch

from expunge.densities.base import HarmDensity
from expunge.sampling.correction import Correction


class Brightness(HarmDensity):
    """p_h is how bright the picture is; differentiable and easily lowered."""

    names = texts = ("a bomb",)

    def __init__(self, η: float):
        self.thresholds = torch.tensor([η])

    def per_concept(self, images):
        return torch.sigmoid(4 * images.mean((1, 2, 3)))[:, None]


GRADIENT = Correction(direction="gradient", strength=1.0, start=0.0)
TEXT = Correction(strength=1.0, start=0.0, places=0)
PROMPTS = ["a bomb", "a cat face", "a key"]


def draw(pipeline, prompts=PROMPTS, seeds=(1, 2, 3), **more):
    more = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"} | more
    generators = [torch.Generator().manual_seed(s) for s in seeds[: len(prompts)]]
    return pipeline(prompts, generator=generators, **more).images


def scores(images, density):
    return density(images * 2 - 1).score
