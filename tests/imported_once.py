"""What the server of `forked` imports before it forks; nothing is computed with it."""

import accelerate  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import open_clip  # noqa: F401
import peft  # noqa: F401
import torchvision  # noqa: F401
from diffusers import (  # noqa: F401
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

import expunge.eval.command
import expunge.eval.harness
import expunge.eval.report
import expunge.train.train_erase  # noqa: F401
