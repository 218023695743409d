"""Copies of a folder's pictures are found, others are not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expunge.errors import UserError
from expunge.eval.features.emoji_judge import EmojiJudgeFeatures
from expunge.eval.metrics import Batch
from expunge.eval.metrics.memorisation import Memorisation
from expunge.eval.significance import clustered_wilson
from expunge.pictures import save_png, to_pil
from expunge.results import wilson
from picture_metrics import Pixels, as_pictures, cases_of, measured


def folder_of(images: torch.Tensor, folder: Path) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        save_png(to_pil(image), folder / f"{i:02}.png")
    return folder


def test_copies_of_the_bundled_models_pictures_are_counted(
    emoji: Any, spoiled: Any, tmp_path: Path
) -> None:
    """Half the prompts' pictures are in the folder; a little noise hides no copy."""
    cases, images = emoji
    known = torch.tensor([i % 6 < 3 for i in range(len(cases))])
    folder = folder_of(images[known], tmp_path / "training")
    settings = Memorisation(reference=folder, threshold=0.99, extractor=EmojiJudgeFeatures())
    found = measured(settings, cases, spoiled(0.01))
    assert (found.value, found.n, found.unit) == (0.5, 24, "share")
    assert not found.higher_is_better
    everything = Memorisation(reference=folder, threshold=-0.9, extractor=EmojiJudgeFeatures())
    assert measured(everything, cases, images).value == 1
    told = settings.open().protocol()
    assert (told["threshold"], told["reference"]["pictures"]) == (0.99, 12)


def test_nearest_is_by_cosine_and_the_threshold_counts(tmp_path: Path) -> None:
    # The second picture, a right angle away, is nearest to none of the turned ones but the last.
    folder = folder_of(as_pictures(np.array([[1.0, -1.0], [-1.0, -1.0]])), tmp_path / "two")
    reference = np.array([1.0, -1.0]) / np.sqrt(2)
    angles = np.array([0.0, 0.2, 0.6, 1.0, 3.0])
    turned = [[np.cos(a), np.sin(a)] for a in angles - np.pi / 4]
    assert np.allclose(np.array(turned) @ reference, np.cos(angles))
    for limit, copies in ((1.0, 1), (0.95, 2), (0.8, 3), (0.5, 4), (-0.2, 5)):
        settings = Memorisation(reference=folder, threshold=limit, extractor=Pixels(2))
        found = measured(settings, cases_of(5), as_pictures(np.array(turned)))
        assert found.value == copies / 5, limit


def test_pictures_of_one_prompt_are_no_independent_trials(tmp_path: Path) -> None:
    folder = folder_of(as_pictures(np.array([[1.0, -1.0]])), tmp_path / "one")
    settings = Memorisation(reference=folder, threshold=0.9, extractor=Pixels(2))
    copy, other = [0.5, -0.5], [0.5, 0.5]
    none = measured(settings, cases_of(20), as_pictures(np.array([other] * 20)))
    assert (none.value, none.low, none.high) == (0, *wilson(0, 20))
    # Four prompts of ten pictures that all agree: forty trials say no more than four.
    none = measured(settings, cases_of(40, prompts=4), as_pictures(np.array([other] * 40)))
    assert (none.low, none.high) == pytest.approx(wilson(0, 4))
    rows = [copy if i % 4 == 0 else other for i in range(40)]
    found = measured(settings, cases_of(40, prompts=4), as_pictures(np.array(rows)))
    assert found.value == 0.25
    clustered = clustered_wilson([i % 4 == 0 for i in range(40)], [i % 4 for i in range(40)])
    assert (found.low, found.high) == pytest.approx(clustered)
    assert wilson(10, 40)[0] > 0.1 > found.low


def test_an_update_that_fails_changes_nothing(tmp_path: Path) -> None:
    folder = folder_of(as_pictures(np.array([[1.0, -1.0]])), tmp_path / "one")
    tally = Memorisation(reference=folder, threshold=0.9, extractor=Pixels(2)).open()
    images = as_pictures(np.array([[0.5, -0.5], [0.5, 0.5]]))
    tally.update(Batch(tuple(cases_of(2)), images))
    before = tally.compute()
    for spoiled, says in ((images * float("nan"), "NaN"), (images * 0, "all zero")):
        with pytest.raises(FloatingPointError, match=says):
            tally.update(Batch(tuple(cases_of(2)), spoiled))
    assert tally.compute() == before
    assert before.value == 0.5


def test_a_missing_folder_and_a_wrong_threshold_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        Memorisation(
            reference=tmp_path / "none", threshold=0.5, extractor=EmojiJudgeFeatures()
        ).open()
    with pytest.raises(ValueError, match=r"threshold 1.5; allowed: a cosine"):
        Memorisation(reference=tmp_path, threshold=1.5, extractor=EmojiJudgeFeatures())


def test_without_pictures_there_is_no_share(tmp_path: Path) -> None:
    folder = folder_of(as_pictures(np.array([[1.0, -1.0]])), tmp_path / "one")
    found = Memorisation(reference=folder, threshold=0.9, extractor=Pixels(2)).open().compute()
    assert (found.value, found.low, found.n, found.unit) == (None, None, 0, "share")
