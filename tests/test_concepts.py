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
