"""What each picture contributes to a metric that is a mean, and that other metrics have no such."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expunge.eval.detectors.emoji_detector import EmojiDetector
from expunge.eval.metrics import Batch
from expunge.eval.metrics.bias import Bias
from expunge.eval.metrics.clip_score import ClipScore
from expunge.eval.metrics.kid import Kid
from expunge.eval.metrics.memorisation import Memorisation
from expunge.eval.metrics.pixel_distance import PixelDistance
from expunge.eval.metrics.vendi import Vendi
from expunge.pictures import save_png, to_pil
from picture_metrics import Pixels, as_pictures, cases_of, gaussian


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_png(to_pil(torch.full((3, 8, 8), 0.5)), tmp_path / "one.png")
    return tmp_path


def seen(settings: Any, base: bool = True) -> Any:
    """A tally that has seen twelve pictures of six prompts."""
    tally = settings.open()
    tally.begin()
    images = as_pictures(gaussian(12, 6, deviation=0.2)).clamp(-1, 1)
    beside = as_pictures(gaussian(12, 6, deviation=0.2, seed=1)).clamp(-1, 1) if base else None
    tally.update(Batch(tuple(cases_of(12, 6)), images, beside))
    return tally


def test_the_mean_of_the_pictures_is_the_metric(folder: Path) -> None:
    for settings in (
        PixelDistance(),
        ClipScore(clip="emoji", device="cpu"),
        Memorisation(reference=folder, threshold=0.0, extractor=Pixels(6)),
        Bias(detector=EmojiDetector(), measure="hallucination"),
        Bias(detector=EmojiDetector(), measure="miss_rate"),
    ):
        tally = seen(settings)
        each, found = tally.each(), tally.compute()
        assert set(each) == set(cases_of(12, 6))
        assert found.value == pytest.approx(np.mean(list(each.values())))
        share = {isinstance(x, bool) for x in each.values()}
        assert share == {found.unit == "share"}


def test_the_base_has_no_distance_to_itself() -> None:
    assert seen(PixelDistance(), base=False).each() == {}


def test_a_number_of_a_set_has_no_part_for_a_picture() -> None:
    assert seen(Vendi(extractor=Pixels(6))).each() is None
    assert seen(Kid(extractor=Pixels(6))).each() is None
    assert seen(Bias(detector=EmojiDetector(), measure="distribution")).each() is None
