from pathlib import Path

import pytest
import torch

from expunge.errors import UserError
from expunge.eval.detectors.emoji_detector import EmojiDetector
from expunge.eval.detectors.emoji_judge import load_judge
from expunge.eval.emoji_vocabulary import Vocabulary


def test_labels_are_the_judges_heads(judge_folder: Path, vocabulary: Vocabulary) -> None:
    detector = EmojiDetector(judge_folder).open()
    judge, names = load_judge(judge_folder)
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    verdict = judge.judge(images)
    found = detector.observe(images)
    assert len(found) == 5
    for i, seen in enumerate(found):
        assert set(seen) == detector.labels
        for j, name in enumerate(names["objects"]):
            assert seen[f"object/{name}"] == verdict.objects[i, j].item()
        for kind, chosen in (("styles", verdict.style), ("backgrounds", verdict.background)):
            scores = [seen[f"{kind[:-1]}/{name}"] for name in names[kind]]
            assert sorted(scores, reverse=True) == [1.0] + [0.0] * (len(scores) - 1)
            assert scores.index(1.0) == chosen[i].item()


def test_larger_pictures_are_averaged_down(judge_folder: Path) -> None:
    detector = EmojiDetector(judge_folder).open()
    small = torch.rand(2, 3, 64, 64) * 2 - 1
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for a, b in zip(detector.observe(small), detector.observe(large), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_the_protocol_names_weights_and_threshold(judge_folder: Path) -> None:
    protocol = EmojiDetector(judge_folder, 0.7).open().protocol()
    assert protocol["threshold"] == 0.7
    assert len(protocol["weights"]) == 64
    with pytest.raises(ValueError, match="threshold 0"):
        EmojiDetector(judge_folder, 0.0)


def test_a_missing_judge_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.json"):
        EmojiDetector(tmp_path).open()
