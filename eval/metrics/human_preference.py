"""HPSv2: a CLIP that learned which of two pictures people prefer for a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from expunge.backbones import device_of
from expunge.clip import Clip
from expunge.errors import unknown_name
from expunge.eval.checkpoints import load_into, read_tensors
from expunge.eval.features.clip import clip_protocol
from expunge.eval.metrics import Batch
from expunge.eval.metrics.pictures import MeanTally, PictureSettings, good, says

WHERE = "https://huggingface.co/xswu/HPSv2 (HPS_v2_compressed.pt, HPS_v2.1_compressed.pt)"


@dataclass(frozen=True, kw_only=True)
class HumanPreference(PictureSettings):
    """Mean of 100 cos(f(picture), g(prompt)) of a fine-tuned ViT-H/14 (HPSv2, arXiv 2306.09341).

    Version 2.0 and 2.1 are two files and two scales: their authors give SD 1.4 26.95 and 25.35,
    averaged over prompts of four styles. Figures compare on the same prompts only. n: a hundred
    prompts or more. Interval: cluster bootstrap by prompt. The published checkpoint has not been
    run here, only its architecture's code on a small network.
    """

    checkpoint: Path = field(metadata={"help": f"the weights, from {WHERE}"})
    architecture: str = field(default="ViT-H-14", metadata={"help": "open_clip's name of it"})
    device: str = field(default="auto", metadata={"help": "where it runs"})
    higher_is_better: bool = good(True)
    meaning: str = says("how well people would like the pictures for their prompts")

    def open(self) -> HumanPreferenceTally:
        """Load the checkpoint."""
        return HumanPreferenceTally(self)


class HumanPreferenceTally(MeanTally):
    """Scores of one model's pictures."""

    def __init__(self, settings: HumanPreference) -> None:
        super().__init__(settings)
        self._clip = _load(settings).to(device_of(settings.device))

    def protocol(self) -> dict[str, Any]:
        """Checkpoint and scale."""
        return {"metric": "hps", "formula": "100 x cosine", **clip_protocol(self._clip)}

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """See pictures and their prompts."""
        pictures = self._clip.encode_images(batch.images.to(self._clip.device))
        texts = self._clip.encode_texts([case.prompt for case in batch.cases])
        self._seen.add(batch.cases, (100 * (pictures * texts).sum(1)).cpu().numpy())


def _load(settings: HumanPreference) -> Clip:
    import open_clip

    name = settings.architecture
    if name not in open_clip.list_models():
        raise unknown_name("architecture", name, ["ViT-H-14"], "or another of open_clip")
    tensors = read_tensors(settings.checkpoint, "HPSv2 checkpoint", WHERE)
    model = open_clip.create_model(name)
    load_into(model, tensors, settings.checkpoint, f"a {name}")
    own = model.visual.preprocess_cfg
    size = own["size"]
    return Clip(
        f"HPSv2 {name}",
        model,
        open_clip.get_tokenizer(name),
        (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        own["mean"],
        own["std"],
        own["interpolation"],
    )
