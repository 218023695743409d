from dataclasses import fields, replace

import pytest

from expunge.concepts import Concept


def test_targets_fill_the_templates_and_the_name() -> None:
    concept = Concept(targets=["a bomb", "a dagger"], templates=["{}", "{} in ink style"])
    assert concept.name == "a bomb"
    assert concept.prompts() == [
        "a bomb",
        "a bomb in ink style",
        "a dagger",
        "a dagger in ink style",
    ]


@pytest.mark.parametrize("bad", [{"targets": []}, {"targets": ["a", " "]}])
def test_an_empty_concept_is_refused(bad) -> None:
    with pytest.raises(ValueError, match="allowed: one text or more"):
        Concept(**bad)


@pytest.mark.parametrize("template", ["no place", "{} and {}", ""])
def test_a_template_has_one_place(template) -> None:
    with pytest.raises(ValueError, match="templates"):
        Concept(targets=["x"], templates=[template])


@pytest.mark.parametrize(
    ("anchor", "prompt", "anchored"),
    [
        ("a key", "a bow in ink style", "a key in ink style"),
        ("a key", "a cat and a bow tie", "a cat and a key"),
        ("a key", "a bow, a bow tie", "a key, a key"),
        ("a key", "a bowl", "a bowl"),
        ("", "a bow", ""),
        ("", "a picture of a bow in ink style", "a picture of in ink style"),
        (r"\1", "a bow", r"\1"),
    ],
)
def test_the_anchor_takes_the_targets_place(anchor, prompt, anchored) -> None:
    assert Concept(targets=["a bow", "a bow tie"], anchor=anchor).anchored(prompt) == anchored


def test_what_names_a_target_is_not_retained() -> None:
    concept = Concept(
        targets=["a bow"],
        preserve=["", "a bow", "a rainbow", "a Bow in ink style", "bowls", "a cat and a bow"],
    )
    assert concept.retained() == ["", "a rainbow", "bowls"]


@pytest.mark.parametrize(
    ("target", "prompt", "mentioned"),
    [
        ("C++", "a book on C++", True),
        ("C++", "a book on C", False),
        ("Yahoo!", "the Yahoo! sign", True),
        ("ink", "a pink cup", False),
    ],
)
def test_a_target_is_found_as_whole_words_whatever_it_ends_in(target, prompt, mentioned) -> None:
    assert Concept(targets=[target]).mentioned_in(prompt) is mentioned


def test_in_words_is_everything_but_a_path() -> None:
    plain = Concept(targets=["a bomb"], tokens=["bomb.safetensors"])
    assert replace(plain, images="pictures").in_words() == plain.in_words()
    assert {"images", *plain.in_words()} == {field.name for field in fields(plain)}
