"""δ on the concept's tokens: where it acts, how it climbs, where it may not go."""

from dataclasses import replace

import pytest
import torch

from expunge import backbones, soft_tokens
from expunge.concepts import Concept
from expunge.conditioning import condition
from expunge.errors import UserError
from expunge.train.noised import Noised
from expunge.train.preserve import Preserve
from expunge.train.robust import Robust
from expunge.train.train_erase import train
from small_runs import small_run

CONCEPT = Concept(targets=["a bomb", "a key"])


@pytest.fixture(params=["tiny_sd1", "tiny_sdxl"])
def pipeline(request):
    return backbones.load_pipeline(request.getfixturevalue(request.param))


def norms(pipeline, attack) -> list[torch.Tensor]:
    return [δ.norm(dim=1) for row in attack.δ for δ in row]


def radii(pipeline, attack) -> list[torch.Tensor]:
    return [
        attack._radii(encoder, tokens)
        for encoder, ids in zip(attack.encoders, attack.ids, strict=True)
        for tokens in ids
    ]


def test_only_what_follows_the_target_reads_otherwise(pipeline) -> None:
    attack = Robust().open(pipeline, CONCEPT, seed=0)
    clean = condition(pipeline, ["in ink a bomb", "a key"])
    moved = attack(["in ink a bomb", "a key"])
    start = 3  # after the token that begins every text, and two words
    torch.testing.assert_close(moved.states[0, :start], clean.states[0, :start])
    assert not torch.allclose(moved.states[0, start + 1 :], clean.states[0, start + 1 :])
    assert not torch.allclose(moved.states[1, 1:], clean.states[1, 1:])
    again = condition(pipeline, ["in ink a bomb", "a key"])
    assert torch.equal(again.states, clean.states)  # the hooks are gone


def test_of_a_soft_token_every_vector_is_moved(pipeline) -> None:
    generator, k = torch.Generator().manual_seed(0), 3
    widths = [e.get_input_embeddings().weight.shape[1] for e in encoders_of(pipeline)]
    rows = [torch.randn(k, width, generator=generator) for width in widths]
    soft_tokens.add(pipeline, soft_tokens.SoftToken("<it>", rows))
    attack = Robust().open(pipeline, Concept(targets=["<it>"]), seed=0)
    assert [len(tokens) for ids in attack.ids for tokens in ids] == [k] * len(widths)
    for row in attack.δ:
        row[0].data[: k - 1] = 0
    clean, moved = condition(pipeline, ["in ink <it>"]), attack(["in ink <it>"])
    last = 3 + k - 1  # after the token that begins every text, two words and the other vectors
    torch.testing.assert_close(moved.states[0, :last], clean.states[0, :last])
    assert not torch.allclose(moved.states[0, last], clean.states[0, last])


def encoders_of(pipeline) -> list:
    return [encoder for _, encoder in soft_tokens.text_encoders(pipeline)]


def test_it_climbs_and_stays_in_the_ball(pipeline) -> None:
    attack = Robust(radius=0.3, step=0.5, restart=1000).open(pipeline, CONCEPT, seed=0)
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(attack(["a bomb"]).states.shape, generator=generator)
    values = []
    for _ in range(12):
        value = (attack(["a bomb"]).states * goal).sum()
        values.append(value.item())
        value.backward()
        attack.climb(lambda g: g)
        for found, most in zip(norms(pipeline, attack), radii(pipeline, attack), strict=True):
            assert (found <= most * 1.001).all()
    assert values[-1] > values[0]
    assert max(values[6:]) > max(values[:3])


def test_without_a_gradient_it_stays(pipeline) -> None:
    attack = Robust().open(pipeline, CONCEPT, seed=0)
    before = [δ.detach().clone() for row in attack.δ for δ in row]
    attack.climb(lambda g: g)
    after = [δ for row in attack.δ for δ in row]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_it_begins_anew_and_comes_back_from_its_state(pipeline) -> None:
    attack = Robust(restart=3).open(pipeline, CONCEPT, seed=1)
    first = attack.δ[0][0].detach().clone()
    for _ in range(3):
        attack.climb(lambda g: g)
    assert not torch.equal(attack.δ[0][0], first)
    again = Robust(restart=3).open(pipeline, CONCEPT, seed=1)
    again.load_state_dict(attack.state_dict())
    assert again.steps == 3
    assert torch.equal(again.δ[0][0], attack.δ[0][0])
    assert again.δ[0][0].requires_grad
    assert torch.equal(again(["a bomb"]).states, attack(["a bomb"]).states)


def test_only_the_attack_has_a_gradient(pipeline) -> None:
    attack = Robust().open(pipeline, CONCEPT, seed=0)
    clean = condition(pipeline, ["a bomb"]).states
    for _ in range(3):
        attack(["a bomb"]).states.sum().backward()
        attack.climb(lambda g: g)
    assert torch.equal(condition(pipeline, ["a bomb"]).states, clean)
    assert all(p.grad is None for encoder in attack.encoders for p in encoder.parameters())


def test_a_prompt_without_the_target_is_refused(pipeline) -> None:
    attack = Robust().open(pipeline, CONCEPT, seed=0)
    with pytest.raises(UserError, match="robust"):
        attack(["a cat face"])


def test_a_target_that_a_sentence_splits_otherwise_is_found_before_anything_is_lost(
    tiny_sd1, tmp_path
) -> None:
    run = small_run(tiny_sd1, tmp_path / "out", steps=1)
    train(run)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    glued = replace(run.concept, templates=["{}", "{}s in a row"])
    again = replace(run, concept=glued, robust=Robust(), preserve=Preserve(), overwrite=True)
    with pytest.raises(UserError, match=r"'a bombs in a row'.*robust"):
        train(again)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("neutral", ["a picture", "no bombshell"])
def test_a_neutral_prompt_in_the_place_of_the_concepts_is_not_attacked(
    tiny_sd1, tmp_path, neutral
) -> None:
    run = small_run(
        tiny_sd1, tmp_path / "out", latents=Noised(count=4, steps=2, unprompted=0.5),
        robust=Robust(share=1.0), preserve=Preserve(), steps=3,
    )  # fmt: skip
    assert train(replace(run, concept=replace(run.concept, neutral=neutral))).is_file()


@pytest.mark.parametrize(
    "bad",
    [
        {"radius": 0.0},
        {"radius": float("nan")},
        {"step": 0.0},
        {"step": float("inf")},
        {"share": 2.0},
        {"restart": 0},
    ],
)
def test_senseless_settings(bad) -> None:
    with pytest.raises(ValueError, match="robust"):
        Robust(**bad)
