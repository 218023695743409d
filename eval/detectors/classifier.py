"""Any image classifier of transformers as a judge."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from expunge.errors import UserError
from expunge.eval.cases import Observation
from expunge.eval.detectors import check_threshold
from expunge.eval.detectors.picture_bytes import to_bytes
from expunge.silence import quiet

# Of settings, what says where and by which version they were written.
_ORIGIN = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Classifier:
    """The classes of an image classifier, by the names that its `id2label` gives them.

    Softmax over the classes, or the sigmoid of each where the model says that it was trained for
    several labels at a time. Of classes of one name, the greatest score counts.
    """

    model: str = field(metadata={"help": "a folder, or the hub's owner/name; safetensors only"})
    revision: str = field(default="main", metadata={"help": "the hub's branch or commit"})
    scores: Literal["softmax", "sigmoid"] | None = field(
        default=None, metadata={"help": "null: as the model's problem_type says"}
    )
    threshold: float = field(default=0.5, metadata={"help": "seen from this score on"})
    device: str = field(default="cpu", metadata={"help": "where it runs"})

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    def open(self) -> OpenClassifier:
        """Load the model and its image processor.

        Raises:
            UserError: There is no such model, a file or a weight of it is missing, or it is no
                classifier.
        """
        from transformers import AutoImageProcessor, AutoModelForImageClassification
        from transformers.utils import logging

        try:
            with quiet(logging):
                model, loaded = AutoModelForImageClassification.from_pretrained(
                    self.model,
                    revision=self.revision,
                    use_safetensors=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
                processor = AutoImageProcessor.from_pretrained(self.model, revision=self.revision)
        # transformers and the libraries below it raise whatever they come across.
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"got classifier {self.model}, which cannot be loaded ({said}); allowed: a folder "
                "or hub name of an image classifier with its image processor, in safetensors"
            ) from error
        # transformers only warns, and then judges with random numbers.
        if missing := sorted(loaded["missing_keys"]):
            raise UserError(
                f"got classifier {self.model} without {len(missing)} of its weights "
                f"({', '.join(missing[:3])}); allowed: a whole image classifier"
            )
        return OpenClassifier(model.to(self.device).eval(), processor, self)


class OpenClassifier:
    """The loaded classifier."""

    def __init__(self, model: Any, processor: Any, settings: Classifier) -> None:
        self._model, self._processor, self._settings = model, processor, settings
        names = model.config.id2label
        self._names = [str(names[i]) for i in range(len(names))]
        self.labels = frozenset(self._names)
        self._scores = settings.scores or _scores_of(model.config.problem_type, settings.model)

    def protocol(self) -> dict[str, Any]:
        """Hash of weights, preprocessing and configuration, labels, threshold."""
        digest = hashlib.sha256()
        # The configuration says which score has which name, and the activations between weights.
        for settings in (self._processor, self._model.config):
            own = {k: v for k, v in settings.to_dict().items() if k not in _ORIGIN}
            digest.update(json.dumps(own, sort_keys=True, default=str).encode())
        for key, value in sorted(self._model.state_dict().items()):
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
        return {
            "detector": "classifier",
            "name": f"classifier-{Path(self._settings.model).name}",
            "version": 1,
            "weights": digest.hexdigest(),
            "labels": sorted(self.labels),
            "threshold": self._settings.threshold,
            "colour order": "rgb",
            "input": type(self._processor).__name__,
            "scores": self._scores,
            "unusual": {"scores": self._scores} if self._settings.scores else {},
        }

    @torch.no_grad()
    def observe(self, images: Tensor) -> list[Observation]:
        """The score of each class for pictures (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: Pictures of another shape.
            FloatingPointError: The pictures or the scores hold NaN or infinities.
        """
        pictures = [Image.fromarray(picture) for picture in to_bytes(images)]
        inputs = self._processor(images=pictures, return_tensors="pt").to(self._settings.device)
        logits = self._model(**inputs).logits.float()
        each = logits.softmax(dim=1) if self._scores == "softmax" else logits.sigmoid()
        if not each.isfinite().all():
            raise FloatingPointError("the classifier's scores are NaN or infinite")
        return [self._named(row) for row in each.tolist()]

    def _named(self, row: list[float]) -> dict[str, float]:
        # The greatest of namesakes is the last, and stays.
        return dict(sorted(zip(self._names, row, strict=True), key=itemgetter(1)))


def _scores_of(problem_type: str | None, model: str) -> str:
    if problem_type == "regression":
        raise UserError(
            f"got classifier {model}, which was trained for regression; allowed: a classifier, or "
            "say scores: softmax or sigmoid"
        )
    return "sigmoid" if problem_type == "multi_label_classification" else "softmax"
