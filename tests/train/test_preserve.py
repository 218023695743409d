import random

import pytest
import torch

from expunge.concepts import Concept
from expunge.train.preserve import Preserve, nearest

CONCEPT = Concept(
    targets=["a bomb"],
    templates=["{}", "{} in ink style"],
    preserve=["", "a cat face", "a key", "a bomb", "a picture of a bus on a white background"],
)


def drawn(preserve: Preserve, n: int = 200) -> list[tuple[str, str]]:
    rng = random.Random(0)
    return [pair for _ in range(n) for pair in preserve.prompts(CONCEPT, rng)]


def test_without_weight_there_is_nothing() -> None:
    assert drawn(Preserve(weight=0.0)) == []


def test_retained_prompts_are_their_own_target_and_never_name_the_concept() -> None:
    pairs = drawn(Preserve(weight=1.0, batch_size=3))
    assert len(pairs) == 600
    assert all(student == teacher for student, teacher in pairs)
    assert {student for student, _ in pairs} == set(CONCEPT.retained())


def test_retained_nouns_stand_in_every_template() -> None:
    templates = ["{}", "{} on a blue background"]
    prompts = {student for student, _ in drawn(Preserve(weight=1.0, templates=templates))}
    nouns = ("a cat face", "a key")
    assert prompts == {
        "",
        "a picture of a bus on a white background",
        *nouns,
        *(f"{noun} on a blue background" for noun in nouns),
    }


def test_half_of_the_retained_are_neighbours() -> None:
    rng = random.Random(0)
    preserve = Preserve(weight=1.0, batch_size=1000)
    prompts = [student for student, _ in preserve.prompts(CONCEPT, rng, ["a key"])]
    # Half of them, and a quarter of the other half.
    assert 0.58 < prompts.count("a key") / 1000 < 0.67
    assert set(prompts) == set(CONCEPT.retained())


def test_the_nearest_are_nearest_in_angle_about_the_mean() -> None:
    retained = torch.tensor([[[9.0, 1, 0]], [[0, 9, 1]], [[6, 4, 3]], [[0, 2, 9]]])
    assert nearest(torch.tensor([[[10.0, 0, 0]]]), retained, 2) == [0, 2]
    both = torch.tensor([[[10.0, 0, 0]], [[0, 10, 0]]])
    assert sorted(nearest(both, retained, 1)) == [0, 1]
    assert sorted(nearest(both, retained, 9)) == [0, 1, 2, 3]


def test_beside_the_target_the_teacher_reads_the_other_object_alone() -> None:
    for student, teacher in drawn(Preserve(weight=1.0, pairs=1.0)):
        assert "a bomb" in student
        assert " and " in student
        assert "bomb" not in teacher
        other = teacher.removesuffix(" in ink style")
        assert other in ("a cat face", "a key")
        assert student in (
            teacher.replace(other, f"{other} and a bomb"),
            teacher.replace(other, f"a bomb and {other}"),
        )


def test_the_share_of_pairs_is_what_was_asked() -> None:
    pairs = drawn(Preserve(weight=1.0, pairs=0.3), n=500)
    share = sum(student != teacher for student, teacher in pairs) / len(pairs)
    assert 0.26 < share < 0.34


def test_the_loss_is_weighted_and_of_each_sample() -> None:
    loss = Preserve(weight=2.0).loss(
        torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    )
    assert loss.tolist() == [2.0, 8.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"weight": -1},
        {"weight": float("inf")},
        {"batch_size": 0},
        {"pairs": 1.5},
        {"templates": []},
        {"neighbours": -1},
    ],
)
def test_senseless_settings(bad) -> None:
    with pytest.raises(ValueError, match="preserve"):
        Preserve(**bad)
