import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from expunge.clip import load_clip
from expunge.errors import UserError
from expunge.eval.cases import Case, Plan
from expunge.eval.emoji_vocabulary import Vocabulary
from expunge.eval.emoji_words import TYPOS, EmojiWords, WordList, misspelt
from expunge.eval.suite import Suite, load_suite


@pytest.fixture(scope="module")
def words() -> WordList:
    return WordList.read()


@pytest.fixture(scope="module")
def suite() -> Suite:
    return load_suite("emoji_words")


def group(plan: Plan, name: str) -> list[Case]:
    return [case for case in plan.cases if case.group == name]


def says(text: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE) is not None


def test_every_object_has_other_words_and_none_names_an_object(
    words: WordList, vocabulary: Vocabulary
) -> None:
    assert list(words.objects) == list(vocabulary.phrases)
    parts = {part for name in vocabulary.phrases for part in name.split()}
    parts -= {"face", "glass", "tree"}
    for name, other in words.objects.items():
        assert len(set(other.paraphrases)) == 2
        assert {language for language, _ in other.translations} == set(words.frames)
        for text in other.paraphrases:
            assert not [part for part in parts if says(text, part)], (name, text)
            assert not [c for c in vocabulary.categories if says(text, c)], (name, text)
        for _, text in other.translations:
            assert not [part for part in name.split() if says(text, part)], (name, text)


def test_the_nearest_are_the_guides(words: WordList, vocabulary: Vocabulary) -> None:
    names = list(vocabulary.phrases)
    vectors = load_clip("emoji").encode_texts(list(vocabulary.phrases.values()))
    cosines = vectors @ vectors.T
    for i, name in enumerate(names):
        found = [names.index(other) for other in words.objects[name].nearest]
        assert len(set(found)) == 8
        assert i not in found
        rest = [j for j in range(len(names)) if j != i and j not in found]
        assert cosines[i, found].min() >= cosines[i, rest].max() - 1e-5


@pytest.mark.parametrize("concept", [["bomb"], ["wine glass"], ["skull", "cigarette", "a bow"]])
def test_the_name_is_never_spelled_and_the_question_is_the_object(
    suite: Suite, vocabulary: Vocabulary, concept: list[str]
) -> None:
    plan = suite.prompts.plan(concept)
    names = [target.name for target in vocabulary.resolve(concept)]
    assert set(suite.groups) == {case.group for case in plan.cases}
    assert {q.metric for case in plan.cases for q in case.questions} == set(suite.metrics)
    for case in plan.cases:
        assert not [name for name in names if says(case.prompt, name)], case
        if case.group == "nearest":
            (label,) = case.questions[0].labels
            kept = label.removeprefix("object/")
            assert vocabulary.phrases[kept] in case.prompt
            assert kept not in names
        else:
            (about,) = case.about
            assert case.questions[0].labels == (f"object/{about}",)
            assert about in names
    assert set(plan.tested.labels) == {f"object/{name}" for name in names}


def test_all_ways_take_turns(suite: Suite, words: WordList) -> None:
    plan = suite.prompts.plan(["bomb"])
    said = Counter(
        text
        for case in group(plan, "paraphrase")
        for text in words.objects["bomb"].paraphrases
        if text in case.prompt
    )
    assert set(said.values()) == {32}
    pairs = words.objects["bomb"].translations
    expected = {frame.format(text) for language, text in pairs for frame in words.frames[language]}
    captions = Counter(case.prompt for case in group(plan, "translation"))
    assert captions == dict.fromkeys(expected, 4) | {"una bomba": 8}
    near = Counter(case.about for case in group(plan, "nearest"))
    assert set(near.values()) == {8}
    for name in ("paraphrase", "typo"):
        cases = group(plan, name)
        assert sum("style" in c.prompt or "drawing" in c.prompt for c in cases) == len(cases) // 2


def test_a_plan_is_a_function_of_the_concept_alone(suite: Suite) -> None:
    one = suite.prompts.plan(["skull"])
    assert one == load_suite("emoji_words").prompts.plan(["skull"])
    assert one.cases == suite.prompts.plan(["a skull"]).cases
    pictures = Counter((case.prompt, case.seed) for case in one.cases)
    assert max(pictures.values()) == 1
    both = suite.prompts.plan(["skull", "bomb"])
    shared = {(c.prompt, c.seed) for c in group(one, "paraphrase")}
    assert len(shared & {(c.prompt, c.seed) for c in group(both, "paraphrase")}) >= 24
    few = suite.prompts.plan(["skull"], limit=3)
    for name in suite.groups:
        assert group(few, name) == group(one, name)[:3]
    other = replace(suite.prompts, seed=1).plan(["skull"])  # type: ignore[type-var]
    assert [case.prompt for case in other.cases] == [case.prompt for case in one.cases]
    assert not {case.seed for case in other.cases} & {case.seed for case in one.cases}


def test_a_neighbour_that_is_erased_too_is_no_neighbour(suite: Suite, words: WordList) -> None:
    first, second = words.objects["bomb"].nearest[:2]
    plan = suite.prompts.plan(["bomb", first, second])
    kept = {label for case in group(plan, "nearest") for label in case.questions[0].labels}
    assert not kept & set(plan.tested.labels)


@pytest.mark.parametrize("kind", TYPOS)
def test_a_typo_is_one_slip(vocabulary: Vocabulary, kind: str) -> None:
    known = {word for phrase in vocabulary.phrases.values() for word in phrase.split()}
    for name in vocabulary.phrases:
        made = {misspelt(name, kind, (name, k), known) for k in range(20)}
        assert misspelt(name, kind, (name, 0), known) in made
        for slip in made:
            assert slip != name
            assert abs(len(slip) - len(name)) <= 1
            assert not known & set(slip.split()) - set(name.split())
    assert misspelt("bomb", "left out", 0, {"omb", "bmb", "bob"}) == "bom"
    # Nothing can be left out that would not spell a known word: another slip is made.
    assert len(misspelt("bomb", "left out", 0, {"omb", "bmb", "bob", "bom"})) >= 4


def test_only_objects_have_other_words(suite: Suite, tmp_path: Path) -> None:
    for concept in ("a weapon", "ink"):
        with pytest.raises(UserError, match="for a suite of other words for objects"):
            suite.prompts.plan([concept])
    with pytest.raises(UserError, match="limit 0"):
        suite.prompts.plan(["bomb"], limit=0)
    with pytest.raises(ValueError, match="without a group"):
        EmojiWords()
    prompts = suite.prompts
    assert isinstance(prompts, EmojiWords)
    for text in ("frames: {}\nobjects: 3\n", "objects: [", None):
        file = tmp_path / "words.yaml"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        with pytest.raises(UserError, match="got word list") as error:
            replace(prompts, words=file).plan(["bomb"])
        assert "\n" not in str(error.value)
    file.write_text("frames: {}\nobjects: {}\n")
    with pytest.raises(UserError, match="the object bomb, for which the word list has no words"):
        replace(prompts, words=file).plan(["bomb"])
