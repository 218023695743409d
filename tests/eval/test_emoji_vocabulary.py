import json
from pathlib import Path

import pytest

from expunge.errors import UserError
from expunge.eval.emoji_vocabulary import Vocabulary, normalise


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("bomb", "object", "bomb"),
        ("a bomb", "object", "bomb"),
        (" The Bomb. ", "object", "bomb"),
        ("a picture of a bomb", "object", "bomb"),
        ("an emoji of a bomb", "object", "bomb"),
        ("an axe", "object", "axe"),
        ("grapes", "object", "grapes"),
        ("cat_face", "object", "cat face"),
        ("a weapon", "category", "weapon"),
        ("weapon", "category", "weapon"),
        ("a horror thing", "category", "horror"),
        ("ink", "style", "ink"),
        ("ink style", "style", "ink"),
        ("in ink style", "style", "ink"),
        ("an ink drawing", "style", "ink"),
    ],
)
def test_a_text_names_an_object_a_category_or_a_style(
    vocabulary: Vocabulary, text: str, kind: str, name: str
) -> None:
    (target,) = vocabulary.resolve([text])
    assert (target.kind, target.name) == (kind, name)


def test_every_phrase_of_the_vocabulary_is_understood(vocabulary: Vocabulary) -> None:
    for name, phrase in vocabulary.phrases.items():
        (target,) = vocabulary.resolve([phrase])
        assert (target.kind, target.name, target.objects) == ("object", name, (name,))
    for name, phrase in vocabulary.category_phrases.items():
        (target,) = vocabulary.resolve([phrase])
        assert (target.kind, target.objects) == ("category", vocabulary.categories[name])


def test_the_same_target_twice_counts_once(vocabulary: Vocabulary) -> None:
    assert len(vocabulary.resolve(["bomb", "a bomb", "Bomb"])) == 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a bom"], "'a bom'.*did you mean bomb"),
        (["Van Gogh"], "'Van Gogh'.*allowed: "),
        (["bomb", "a daggre"], "did you mean dagger"),
        ([""], "unknown concept"),
        ([], "empty concept"),
    ],
)
def test_a_text_that_the_model_does_not_know_is_refused(
    vocabulary: Vocabulary, texts: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        vocabulary.resolve(texts)


def test_a_concept_that_leaves_nothing_to_keep_is_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(UserError, match="leaves something"):
        vocabulary.resolve(list(vocabulary.phrases))
    with pytest.raises(UserError, match="leaves something"):
        vocabulary.resolve(list(vocabulary.styles))


def test_normalise_keeps_what_only_looks_like_an_article() -> None:
    assert normalise("an anchor") == "anchor"
    assert normalise("anemone") == "anemone"


@pytest.mark.parametrize("text", ["no json", "[]", json.dumps({"objects": {}})])
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(UserError, match=r"v\.json"):
        Vocabulary.read(tmp_path / "v.json")
    with pytest.raises(UserError, match="No such file"):
        Vocabulary.read(tmp_path / "missing.json")
