"""Several targets: whose turn it is, what each is mapped to."""

import random
from collections import Counter
from itertools import islice

import pytest
import torch

from expunge.concepts import Concept
from expunge.errors import UserError
from expunge.train.several import Several, Turns

CONCEPT = Concept(
    targets=["a bomb", "a skull", "a bomb shelter"], anchors=["a balloon", "a cat face", "a house"]
)


def picks(turns: Turns, n: int = 2000) -> Counter:
    return Counter(c.targets[0] for c in dealt(turns, n))


def dealt(turns: Turns, n: int = 1) -> list[Concept]:
    return list(islice(turns.deal(random.Random(0)), n))


def test_random_meets_every_target_before_any_twice() -> None:
    first, second = (dealt(Turns(Several(), CONCEPT), 6)[i : i + 3] for i in (0, 3))
    for turn in (first, second):
        assert {c.targets[0] for c in turn} == set(CONCEPT.targets)
        assert {c.anchor for c in turn} == set(CONCEPT.anchors)
    alone = Concept(targets=["a bomb"])
    assert dealt(Turns(Several(), alone), 2) == [alone] * 2
    assert dealt(Turns(Several(), CONCEPT, whole=True), 2) == [CONCEPT] * 2


@pytest.mark.parametrize("order", ["random", "joined", "balanced"])
def test_no_target_is_taken_for_what_stays_beside_another(order) -> None:
    concept = Concept(targets=["a bomb", "a bow"], preserve=["a key", "a bow", "a bomb"])
    assert all(c.retained() == ["a key"] for c in dealt(Turns(Several(order=order), concept), 9))


def test_joined_is_one_prompt_with_all_of_them() -> None:
    (joined,) = dealt(Turns(Several(order="joined"), CONCEPT))
    assert joined.targets == ["a bomb, a skull, a bomb shelter"]
    assert joined.anchored("a bomb, a skull, a bomb shelter") == "a balloon, a cat face, a house"


@pytest.mark.parametrize(
    ("anchors", "read"),
    [
        ({"anchor": "a balloon"}, "a balloon in ink style"),
        ({}, "in ink style"),
        ({"anchors": ["a balloon", "", "a house"]}, "a balloon, a house in ink style"),
    ],
)
def test_joined_is_anchored_once_wherever_it_is_anchored(anchors, read) -> None:
    turns = Turns(Several(order="joined"), Concept(targets=CONCEPT.targets, **anchors))
    prompt = "a bomb, a skull, a bomb shelter in ink style"
    assert turns.anchored(prompt) == dealt(turns)[0].anchored(prompt) == read


def test_balanced_is_even_until_something_is_learnt() -> None:
    found = picks(Turns(Several(order="balanced"), CONCEPT))
    assert all(abs(n / 2000 - 1 / 3) < 0.05 for n in found.values())


def test_balanced_turns_to_what_is_least_erased() -> None:
    turns = Turns(Several(order="balanced", memory=0.0), CONCEPT)
    for prompt, losses in {"a bomb": [2.0] * 8 + [0.2], "a skull": [5.0] * 8 + [5.0]}.items():
        turns.learn([f"{prompt} in ink style"] * len(losses), torch.tensor(losses))
    assert turns.remaining("a bomb") == pytest.approx(0.1)
    assert turns.remaining("a skull") == 1.0
    found = picks(turns)
    assert found["a skull"] > 7 * found["a bomb"] > 0
    assert dealt(turns)[0].anchor in CONCEPT.anchors


def test_what_is_gone_is_asked_after_now_and_then() -> None:
    turns = Turns(Several(order="balanced", memory=0.0), CONCEPT)
    turns.learn(["a bomb"] * 9, torch.tensor([1.0] * 8 + [0.0]))
    assert turns.remaining("a bomb") > 0


def test_turns_come_back_from_their_state() -> None:
    turns = Turns(Several(order="balanced"), CONCEPT)
    turns.learn(["a bomb"] * 20, torch.linspace(1, 0.1, 20))
    again = Turns(Several(order="balanced"), CONCEPT)
    again.load_state_dict(turns.state_dict())
    assert picks(again) == picks(turns)


def test_the_longest_target_is_the_one_that_is_named() -> None:
    assert CONCEPT.target_in("a bomb shelter in ink style") == "a bomb shelter"
    assert CONCEPT.target_in("the bomb") == "a bomb"
    assert CONCEPT.target_in("a key") is None


def test_every_target_has_its_own_anchor() -> None:
    assert CONCEPT.anchored("a skull and a bomb") == "a cat face and a balloon"
    one = Concept(targets=["a bomb", "a skull"], anchor="a key")
    assert one.anchored("a skull and a bomb") == "a key and a key"
    with pytest.raises(UserError, match="2 anchors of 3 targets"):
        Concept(targets=["a", "b", "c"], anchors=["x", "y"])
