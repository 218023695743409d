import re
from collections import Counter
from dataclasses import replace

import pytest

from expunge.errors import UserError
from expunge.eval.cases import Case, Plan
from expunge.eval.emoji_prompts import EmojiPrompts
from expunge.eval.emoji_vocabulary import Vocabulary
from expunge.eval.suite import Suite, load_suite

CONCEPTS = [
    ["a bomb"],
    ["cigarette"],
    ["bomb", "cigarette", "skull"],
    ["a weapon"],
    ["ink"],
    ["a weapon", "ink"],
    ["bomb", "dagger", "pill", "ghost", "frog", "sun"],
]


def group(plan: Plan, name: str) -> list[Case]:
    return [case for case in plan.cases if case.group == name]


def abouts(plan: Plan, name: str) -> list[str]:
    return [about for case in group(plan, name) for about in case.about]


def names(prompt: str, words: object) -> list[str]:
    return [w for w in words if re.search(rf"\b{re.escape(w)}\b", prompt)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("concept", CONCEPTS, ids=", ".join)
def test_no_kept_group_names_a_target(
    suite: Suite, vocabulary: Vocabulary, concept: list[str]
) -> None:
    plan = suite.prompts.plan(concept)
    targets = vocabulary.resolve(concept)
    words = {name for t in targets for name in t.objects}
    words |= {t.name for t in targets if t.kind != "object"}
    for case in plan.cases:
        erased = names(case.prompt, words)
        if case.group in ("target", "pair"):
            assert erased, case
        else:
            assert not erased, case


@pytest.mark.parametrize("concept", CONCEPTS, ids=", ".join)
def test_pictures_are_distinct_few_enough_and_always_the_same(
    suite: Suite, concept: list[str]
) -> None:
    plan = suite.prompts.plan(concept)
    pictures = Counter((case.prompt, case.seed) for case in plan.cases)
    assert max(pictures.values()) == 1
    assert len({case.seed for case in plan.cases}) == len(plan.cases) <= 420
    assert plan == load_suite("emoji").prompts.plan(concept)
    assert all(0 <= case.seed < 2**31 for case in plan.cases)


@pytest.mark.parametrize("concept", CONCEPTS, ids=", ".join)
def test_every_question_can_be_answered(
    suite: Suite, vocabulary: Vocabulary, concept: list[str]
) -> None:
    labels = {f"object/{name}" for name in vocabulary.phrases}
    labels |= {f"style/{name}" for name in vocabulary.styles}
    for case in suite.prompts.plan(concept).cases:
        assert case.group in suite.groups
        for question in case.questions:
            assert question.metric in suite.metrics
            assert set(question.labels) <= labels


@pytest.mark.parametrize("concept", CONCEPTS, ids=", ".join)
def test_kept_questions_ask_for_what_the_prompt_names(
    suite: Suite, vocabulary: Vocabulary, concept: list[str]
) -> None:
    for case in suite.prompts.plan(concept).cases:
        for question in case.questions:
            if suite.metrics[question.metric].higher_is_better:
                for label in question.labels:
                    kind, name = label.split("/")
                    said = vocabulary.phrases[name] if kind == "object" else name
                    assert said in case.prompt, case


def test_one_object(suite: Suite, vocabulary: Vocabulary) -> None:
    plan = suite.prompts.plan(["a bomb"])
    assert Counter(case.group for case in plan.cases) == {
        "target": 64, "in_domain": 64, "cross_domain": 96, "style": 64, "pair": 64,
    }  # fmt: skip
    assert plan.tested.labels == ("object/bomb",)
    target = [case.prompt for case in group(plan, "target")]
    for style in vocabulary.styles:
        assert sum(style in prompt for prompt in target) >= 4
    for background in vocabulary.backgrounds:
        assert sum(f"{background} background" in prompt for prompt in target) >= 2
    for form in ("a bomb", "a picture of a bomb", "an emoji of a bomb", "ink drawing of a bomb"):
        assert form in target
    weapons = {about for about in vocabulary.categories["weapon"] if about != "bomb"}
    assert {*abouts(plan, "in_domain")} == weapons
    others = {n for n, c in vocabulary.category_of.items() if c != "weapon"}
    assert {*abouts(plan, "cross_domain")} == others
    assert Counter(abouts(plan, "style")) == dict.fromkeys(vocabulary.styles, 16)
    first = [re.search(r"a bomb and", case.prompt) is not None for case in group(plan, "pair")]
    assert 20 <= sum(first) <= 44
    assert all(len(case.questions) == 2 for case in group(plan, "pair"))


def test_a_category_is_all_of_its_members(suite: Suite, vocabulary: Vocabulary) -> None:
    plan = suite.prompts.plan(["a weapon"])
    members = vocabulary.categories["weapon"]
    assert plan.tested.labels == tuple(f"object/{name}" for name in members)
    target = group(plan, "target")
    assert {question.labels for case in target for question in case.questions} == {
        plan.tested.labels
    }
    said = Counter(name for case in target for name in names(case.prompt, ["weapon", *members]))
    assert 20 <= said["weapon"] <= 44
    assert all(said[name] >= 2 for name in members)
    assert not group(plan, "in_domain")


def test_a_style_is_judged_by_the_style(suite: Suite, vocabulary: Vocabulary) -> None:
    plan = suite.prompts.plan(["ink"])
    assert plan.tested.labels == ("style/ink",)
    for case in group(plan, "target"):
        assert case.questions[0].labels == ("style/ink",)
        assert re.search(r"ink (style|drawing)", case.prompt)
    kept = set(vocabulary.styles) - {"ink"}
    assert {*abouts(plan, "in_domain")} == kept
    assert {*abouts(plan, "style")} == kept
    for case in group(plan, "pair"):
        kept_question, erased = case.questions
        assert kept_question.need == "all"
        assert len(kept_question.labels) == 2
        assert erased.labels == ("style/ink",)


def test_several_objects_share_the_groups(suite: Suite) -> None:
    plan = suite.prompts.plan(["bomb", "cigarette", "skull"])
    assert Counter(abouts(plan, "target")) == {
        "bomb": 24, "cigarette": 24, "skull": 24,
    }  # fmt: skip
    for case in group(plan, "target"):
        # A bomb in place of the cigarette is another failure than a cigarette.
        assert case.questions[0].labels == (f"object/{case.about[0]}",)


def test_two_concepts_share_the_pictures_of_what_both_keep(suite: Suite) -> None:
    bomb, pill = (suite.prompts.plan([name]) for name in ("bomb", "pill"))
    shared = {(c.prompt, c.seed) for c in bomb.cases} & {(c.prompt, c.seed) for c in pill.cases}
    assert len(shared) > 60


def test_a_limit_takes_the_first_of_each_group(suite: Suite) -> None:
    few, all_ = suite.prompts.plan(["bomb"], limit=3), suite.prompts.plan(["bomb"])
    assert Counter(case.group for case in few.cases) == dict.fromkeys(suite.groups, 3)
    for name in suite.groups:
        assert group(few, name) == group(all_, name)[:3]
    with pytest.raises(UserError, match="limit 0"):
        suite.prompts.plan(["bomb"], limit=0)


def test_another_seed_gives_other_noise_to_the_same_prompts(suite: Suite) -> None:
    first = suite.prompts.plan(["bomb"]).cases
    second = replace(suite.prompts, seed=1).plan(["bomb"]).cases  # type: ignore[type-var]
    assert [case.prompt for case in first] == [case.prompt for case in second]
    assert not {case.seed for case in first} & {case.seed for case in second}


def test_an_implied_object_is_never_named_and_its_category_is(vocabulary: Vocabulary) -> None:
    prompts = load_suite("emoji_implied").prompts
    cases = prompts.plan(["a skull"]).cases
    assert len(cases) == 288
    for case in cases:
        assert not names(case.prompt, ["skull"])
        assert "a horror thing" in case.prompt
        assert case.questions[0].labels == ("object/skull",)
    beside = [case for case in cases if len(case.questions) == 2]
    assert 100 < len(beside) < 188
    for case in beside:
        (label,) = case.questions[1].labels
        name = label.removeprefix("object/")
        assert vocabulary.phrases[name] in case.prompt
        assert vocabulary.category_of[name] != vocabulary.category_of["skull"]
    # "a weapon" may bring either.
    two = {case.questions[0].labels for case in prompts.plan(["a bomb", "a dagger"]).cases}
    assert two == {("object/bomb", "object/dagger")}
    assert {c.questions[0].labels for c in prompts.plan(["a bomb", "a skull"]).cases} == {
        ("object/bomb",), ("object/skull",)
    }  # fmt: skip
    with pytest.raises(UserError, match="got the category weapon for a suite"):
        prompts.plan(["a weapon"])


def test_a_suite_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="without a group"):
        EmojiPrompts()


def test_a_suite_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean emoji"):
        load_suite("emojo")
    with pytest.raises(UserError, match="no file"):
        load_suite("missing.yaml")
