"""Concepts in words, against the thesis's formulas computed on their own."""

import pytest
import torch

from expunge.clip import load_clip
from expunge.concepts import Concept
from expunge.densities.clip_text import ClipText
from expunge.errors import UserError

TEXTS = ["a bomb", "a dagger", "a cat face"]


def cosines(clip: str, images: torch.Tensor) -> torch.Tensor:
    """cos(CLIP(x), CLIP(c)) by a loop in float64, from the vectors alone."""
    guide = load_clip(clip)
    pictures, texts = guide.encode_images(images).double(), guide.encode_texts(TEXTS).double()
    table = torch.empty(len(images), len(TEXTS), dtype=torch.float64)
    for i, u in enumerate(pictures):
        for j, v in enumerate(texts):
            table[i, j] = (u @ v) / (u.norm() * v.norm())
    return table


def test_mean_and_top_k_are_the_thesis_formulas(tiny_clip: str, drawn) -> None:
    images = torch.cat([drawn("red", 2), drawn("blue", 2)])
    table = cosines(tiny_clip, images)
    for k in (None, 1, 2, 3):
        harm = ClipText(clip=tiny_clip, targets=TEXTS, top_k=k).build()(images)
        torch.testing.assert_close(harm.per_concept.double(), table, rtol=0, atol=1e-6)
        largest = [sorted(row, reverse=True)[: k or 3] for row in table.tolist()]
        expected = torch.tensor([sum(row) / len(row) for row in largest])
        torch.testing.assert_close(harm.score, expected, rtol=0, atol=1e-6)


def test_gradient_agrees_with_finite_differences(tiny_clip: str, drawn) -> None:
    density = ClipText(clip=tiny_clip, targets=TEXTS, top_k=2).build()
    density.guides = [(c, v.double()) for c, v in density.guides]
    density.guides[0][0].model.double()
    x = drawn("red", 1, size=40).double().requires_grad_()

    def score(images: torch.Tensor) -> torch.Tensor:
        # Not by calling the density, which reads pictures in float32.
        return density.combine(density.per_concept(images)).sum()

    score(x).backward()
    for seed in range(3):
        step = torch.randn(x.shape, dtype=torch.float64, generator=torch.manual_seed(seed)) * 1e-6
        with torch.no_grad():
            change = (score(x + step) - score(x - step)) / 2
        assert change.item() == pytest.approx((x.grad * step).sum().item(), rel=1e-4)


def test_each_concept_has_its_own_threshold(tiny_clip: str, drawn) -> None:
    images = drawn("red", 1)
    table = cosines(tiny_clip, images)[0]
    for chosen in range(3):
        η = [float(s) + (-0.01 if i == chosen else 0.01) for i, s in enumerate(table)]
        density = ClipText(clip=tiny_clip, targets=TEXTS, threshold=η).build()
        assert density.fires(images).item()
    never = [float(s) + 0.01 for s in table]
    assert not ClipText(clip=tiny_clip, targets=TEXTS, threshold=never).build().fires(images).item()


def test_targets_come_from_the_concept_unless_they_are_given(tiny_clip: str) -> None:
    concept = Concept(targets=TEXTS[:2])
    assert ClipText(clip=tiny_clip).build(concept).names == TEXTS[:2]
    assert ClipText(clip=tiny_clip, targets=TEXTS[2:]).build(concept).names == TEXTS[2:]


def test_several_clips_are_averaged(tiny_clip: str, drawn) -> None:
    images = drawn("blue", 3)
    own, thesis = (
        ClipText(clip=tiny_clip, targets=TEXTS, thesis_compat=flag).build()
        for flag in (False, True)
    )
    both = ClipText(clip=[tiny_clip, tiny_clip], targets=TEXTS).build()
    torch.testing.assert_close(both(images).score, own(images).score)
    both.guides = own.guides + thesis.guides
    expected = (own(images).per_concept + thesis(images).per_concept) / 2
    torch.testing.assert_close(both(images).per_concept, expected)


def test_by_default_a_clip_with_a_bias_says_its_threshold(tiny_clip: str) -> None:
    clip = load_clip("emoji")
    density = ClipText(targets=TEXTS).build()
    assert clip.undecided is not None
    torch.testing.assert_close(density.thresholds, torch.full((3,), clip.undecided))
    odds = clip.model.logit_scale.exp() * clip.undecided + clip.model.logit_bias
    assert abs(odds.sigmoid().item() - 0.5) < 1e-6
    without = ClipText(clip=tiny_clip, targets=TEXTS).build()  # it has none: the thesis's figure
    torch.testing.assert_close(without.thresholds, torch.full((3,), 0.23))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "got threshold 1.5; allowed: -1 to 1"),
        ({"threshold": [0.2, 0.3]}, "got 2 thresholds for 3 concepts"),
        ({"top_k": 4}, "got top_k 4 for 3 concepts"),
        ({"top_k": 0}, "got top_k 0"),
        ({"targets": []}, "got no targets"),
        ({"targets": ["a bomb", " "]}, "texts that are not empty"),
        ({"clip": []}, "got clip"),
        ({"clip": "emoij"}, "did you mean emoji"),
    ],
)
def test_what_cannot_be_is_one_line(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ClipText(**{"targets": TEXTS, **settings}).build()
    assert "\n" not in str(error.value)


def test_k_is_compared_with_the_concepts_targets_too() -> None:
    with pytest.raises(UserError, match="got top_k 2 for 1 concepts"):
        ClipText(top_k=2).build(Concept(targets=["a bomb"]))


def test_what_identifies_its_scores(tiny_clip: str) -> None:
    first = ClipText(clip=tiny_clip, targets=TEXTS).build().identity()
    assert first == ClipText(clip=tiny_clip, targets=TEXTS, threshold=0.9).build().identity()
    assert first != ClipText(clip=tiny_clip, targets=TEXTS[:2]).build().identity()
    assert first != ClipText(clip=tiny_clip, targets=TEXTS, thesis_compat=True).build().identity()
