"""The maths of the objectives, and one contract that every row of the table keeps."""

import math
import random
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

from expunge import backbones, prediction
from expunge.concepts import Concept
from expunge.conditioning import Conditioning
from expunge.configuration import dump, parse
from expunge.train.config import TrainConfig
from expunge.train.objectives import OBJECTIVES
from expunge.train.objectives.ablation import Ablation, ablation_target
from expunge.train.objectives.base import ClosedForm, Embedder, Objective, mse
from expunge.train.objectives.esd import Esd, erase_from_target, esd_target
from expunge.train.objectives.hfi import Hfi
from expunge.train.objectives.sdd import Sdd, sdd_target
from expunge.train.objectives.slider import Slider, slider_target
from expunge.train.objectives.spm import Spm, latent_anchors
from expunge.train.objectives.twin import Twin, twin_weight
from expunge.train.predictions import NETWORKS

e0, ep, e_from = torch.randn(3, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
CONCEPT = Concept(
    targets=["a bomb", "a dagger"], templates=["{}", "{} in ink style"], anchor="a balloon"
)


def drawn(objective, n: int = 50) -> set[tuple[str, str]]:
    rng = random.Random(0)
    return {objective.prompts(CONCEPT, rng) for _ in range(n)}


def test_esd_with_no_guidance_is_the_null_prediction() -> None:
    assert torch.equal(esd_target(e0, ep, 0.0), e0)


def test_esd_mirrors_the_concept_at_the_null_prediction() -> None:
    # At η = 1 the null prediction lies half way between the concept and the target.
    torch.testing.assert_close((esd_target(e0, ep, 1.0) + ep) / 2, e0)


def test_esd_is_linear_in_its_strength() -> None:
    one, three = esd_target(e0, ep, 1.0) - e0, esd_target(e0, ep, 3.0) - e0
    torch.testing.assert_close(three, 3 * one)


def test_a_concept_that_is_already_gone_stays() -> None:
    assert torch.equal(esd_target(e0, e0, 1.0), e0)


def test_the_published_scripts_scale_is_shifted_by_one() -> None:
    """The later ESD script writes ep − η'(ep − e0); its default η' = 2 is the paper's η = 1."""
    torch.testing.assert_close(esd_target(e0, ep, 1.0), ep - 2.0 * (ep - e0))


def test_sdd_stops_the_gradient_of_its_target() -> None:
    null = e0.clone().requires_grad_()
    assert not sdd_target(null).requires_grad
    assert torch.equal(sdd_target(null), e0)


def test_sdd_makes_latents_with_all_targets_and_learns_one() -> None:
    assert drawn(Sdd()) == {("a bomb, a dagger", prompt) for prompt in CONCEPT.prompts()}
    assert drawn(Sdd(latents_prompt="single")) == {(p, p) for p in CONCEPT.prompts()}


def test_erased_from_itself_is_esd() -> None:
    assert torch.equal(erase_from_target(e0, e0, ep, 2.0), esd_target(e0, ep, 2.0))
    # The later script erases the concept from its own prompt, which shifts its scale by one.
    torch.testing.assert_close(erase_from_target(ep, e0, ep, 2.0), esd_target(e0, ep, 1.0))


def test_what_it_is_erased_from_stays_where_the_concept_is_nothing() -> None:
    assert torch.equal(erase_from_target(e_from, e0, ep, 0.0), e_from)
    assert torch.equal(erase_from_target(e_from, e0, e0, 5.0), e_from)


def test_erase_from_teaches_the_other_prompt_in_the_same_sentence() -> None:
    objective = Esd(erase_from="a weapon", negative_guidance=0.5)
    assert drawn(objective) == {
        (f"a weapon{style}", f"{target}{style}")
        for target in CONCEPT.targets
        for style in ("", " in ink style")
    }
    student = torch.zeros_like(e0)
    given = {"student/made": student, "teacher/made": e_from, "teacher/null": e0}
    loss = objective.loss(given | {"teacher/concept": ep})
    torch.testing.assert_close(loss, mse(student, e_from - 0.5 * (ep - e0)))


def test_esd_without_another_prompt_and_strength_maps_onto_null() -> None:
    given = {"student/concept": e0, "teacher/null": e0, "teacher/concept": ep}
    assert Esd(negative_guidance=0.0).loss(given).sum() == 0


def test_ablation_stops_the_gradient_of_its_target() -> None:
    anchor = e0.clone().requires_grad_()
    assert not ablation_target(anchor).requires_grad
    assert torch.equal(ablation_target(anchor), e0)


def test_ablation_puts_the_anchor_where_the_target_stood() -> None:
    assert drawn(Ablation()) == {
        (prompt.replace("a bomb", "a balloon").replace("a dagger", "a balloon"), prompt)
        for prompt in CONCEPT.prompts()
    }


@pytest.mark.parametrize(
    ("target", "λ", "needs"),
    [
        ("student", 0.0, {"student/concept", "student_sg/made"}),
        ("teacher", 0.0, {"student/concept", "teacher/made"}),
        ("noise", 0.0, {"student/concept", "noise/made"}),
        # The pass with gradient serves as target as well.
        ("student", 1.0, {"student/concept", "student/made", "noise/made"}),
        ("noise", 1.0, {"student/concept", "student/made", "noise/made"}),
    ],
)
def test_ablation_learns_what_it_says(target, λ, needs) -> None:
    objective = Ablation(target=target, regularisation=λ)
    assert set(objective.needs) == needs
    given = {need: torch.randn_like(e0).requires_grad_() for need in needs}
    learnt = next(
        value
        for need, value in given.items()
        if need != "student/concept" and need.startswith(target)
    )
    expected = mse(given["student/concept"], learnt)
    if λ:
        expected = expected + mse(given["student/made"], given["noise/made"])
    torch.testing.assert_close(objective.loss(given), expected)
    objective.loss(given).sum().backward()
    if λ:  # only ordinary training moves the student under the anchor
        ordinary = 2 * (given["student/made"] - given["noise/made"]) / e0[0].numel()
        torch.testing.assert_close(given["student/made"].grad, ordinary)


def test_a_slider_goes_both_ways_alike() -> None:
    down, up = (slider_target(e_from, ep, e0, η) for η in (-4.0, 4.0))
    torch.testing.assert_close((down + up) / 2, e_from)
    assert not torch.allclose(up, e_from)


def test_a_slider_between_the_same_prompts_does_not_move() -> None:
    assert torch.equal(slider_target(e_from, ep, ep, 4.0), e_from)


def test_a_slider_from_the_concept_itself_is_esd_shifted_by_one() -> None:
    torch.testing.assert_close(slider_target(ep, ep, e0, -3.0), esd_target(e0, ep, 2.0))
    # Under erasure η = 1 is the anchor itself.
    given = {"student/concept": e0, "teacher/concept": ep, "teacher/anchor": e0}
    assert Slider(guidance=1.0).loss(given).max() < 1e-10
    assert Slider(guidance=1.0, direction="enhance").loss(given).min() > 0.1


def test_a_slider_slides_its_subject_and_keeps_attributes_on_both_sides() -> None:
    assert drawn(Slider()) == {(prompt, prompt) for prompt in CONCEPT.prompts()}
    pairs = drawn(Slider(subject="a weapon", attributes=["{} by night"]))
    assert ("a weapon in ink style", "a bomb in ink style by night") in pairs
    assert {made for made, _ in pairs} == {"a weapon", "a weapon in ink style"}
    assert CONCEPT.anchored("a bomb in ink style by night") == "a balloon in ink style by night"
    pairs = drawn(Slider(attributes=["{} by night", "an old {}"]))
    assert ("a bomb", "an old a bomb") in pairs
    assert ("a bomb", "a bomb by night") in pairs


@pytest.mark.parametrize("bad", [{"guidance": -1.0}, {"attributes": ["old"]}])
def test_a_senseless_slider(bad) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Slider(**bad)


def test_latent_anchors_are_as_long_as_the_concept_and_shun_it() -> None:
    """In the plane the density is ∝ min(1, 1 − cos φ), whose moments are known."""
    c = torch.tensor([[[3.0, 4.0]]]).expand(5000, 1, 2)
    a = latent_anchors(c, torch.Generator().manual_seed(0))
    assert a.shape == c.shape
    lengths = a.flatten(1).norm(dim=1) / 5
    assert 0.8 <= lengths.min() < 0.81
    assert 1.19 < lengths.max() <= 1.2
    cos = torch.cosine_similarity(a.flatten(1), c.flatten(1))
    assert cos.mean().item() == pytest.approx(-math.pi / (4 * math.pi - 4), abs=0.02)
    mean_square = (math.pi - 4 / 3) / (2 * math.pi - 2)
    assert cos.square().mean().item() == pytest.approx(mean_square, abs=0.02)


def test_latent_anchors_are_drawn_from_the_generator_alone() -> None:
    c = torch.randn(3, 4, 8)
    one, same, other = (latent_anchors(c, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert not torch.allclose(one[0] / one[0].norm(), one[1] / one[1].norm())


def test_spm_is_esd_held_fast_at_its_anchors() -> None:
    given = {"student/concept": e_from, "teacher/concept": ep, "teacher/anchor": e0}
    given |= {"student/near": ep, "teacher/near": e0}
    esd = mse(e_from, esd_target(e0, ep, 1.0))
    torch.testing.assert_close(Spm(anchoring=0.0).loss(given), esd)
    torch.testing.assert_close(Spm(anchoring=7.0).loss(given), esd + 7 * mse(ep, e0))


def test_hfi_is_sdd_of_one_target() -> None:
    rng = random.Random(0)
    made, learnt = Hfi().prompts(Concept(targets=["<bomb>"]), rng)
    assert made == learnt == "<bomb>"
    predictions = {"student/concept": ep, "student_sg/null": e0}
    assert torch.equal(Hfi().loss(predictions), Sdd().loss(predictions))


def test_mse_is_of_each_sample() -> None:
    a = torch.zeros(2, 1, 2, 2)
    b = torch.stack([torch.ones(1, 2, 2), torch.full((1, 2, 2), 3.0)])
    assert mse(a, b).tolist() == [1.0, 9.0]


@pytest.mark.parametrize("bad", [{"negative_guidance": -1.0}, {"negative_guidance": float("nan")}])
def test_esd_refuses_a_senseless_strength(bad) -> None:
    with pytest.raises(ValueError, match="negative_guidance"):
        Esd(**bad)


def test_twins_of_distance_one_are_weighted_by_min_snr() -> None:
    x0, ε = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8)
    twin = x0 + torch.tensor([1.0, -1.0]).repeat(128).view(4, 8, 8)
    ᾱ = torch.tensor([0.01, 0.3, 0.5, 0.9, 0.999])
    x_t = prediction.noised(x0, ε, ᾱ)
    to_twin = prediction.to_epsilon(twin, x_t, ᾱ, "sample")
    snr = ᾱ / (1 - ᾱ)
    for γ in (0.5, 1.0, 5.0):
        expected = torch.minimum(snr, torch.tensor(γ)) / snr
        torch.testing.assert_close(twin_weight(ε, to_twin, γ), expected, atol=1e-4, rtol=1e-3)


def test_a_picture_that_is_its_own_twin_is_trained_on_as_it_is() -> None:
    ε, student = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    given = {"student/concept": student, "noise/made": ε, "twin/made": ε}
    torch.testing.assert_close(Twin().loss(given), mse(student, ε))


def test_twins_are_drawn_of_the_concept_alone_and_in_company() -> None:
    concept = Concept(targets=["a bomb"], templates=["ink {}"], preserve=["", "a key", "a bomb"])
    for pairs, prompts in (
        (0.0, {"ink a bomb"}),
        (1.0, {"ink a bomb and a key", "ink a key and a bomb"}),
    ):
        rng = random.Random(0)
        drawn = {Twin(pairs=pairs).prompts(concept, rng) for _ in range(40)}
        assert drawn == {(prompt, prompt) for prompt in prompts}


@pytest.mark.parametrize("bad", [{"gamma": 0}, {"gamma": float("nan")}, {"pairs": 1.5}])
def test_senseless_twins(bad) -> None:
    with pytest.raises(ValueError, match="allowed: gamma"):
        Twin(**bad)


CLOSED = [name for name in OBJECTIVES.names() if isinstance(OBJECTIVES.load(name)(), ClosedForm)]
TRAINED = [name for name in OBJECTIVES.names() if name not in CLOSED]


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_form_changes_layers_that_there_are(name) -> None:
    assert OBJECTIVES.load(name)().modules in backbones.MODULE_GROUPS


@pytest.mark.parametrize("name", OBJECTIVES.names())
class TestEveryContract:
    def test_is_a_frozen_dataclass_that_round_trips(self, name) -> None:
        cls = OBJECTIVES.load(name)
        assert is_dataclass(cls)
        assert cls.__dataclass_params__.frozen
        argv = ["--output_dir", "x", "--concept.targets", "[a bomb]", "--objective.type", name]
        argv += ["--concept.anchor", "a balloon"]  # some refuse to do without
        if name == "twin":
            argv += ["--start.type", "uce", "--latents.type", "noised"]
        config = parse(TrainConfig, argv)
        assert type(config.objective) is cls
        assert "type: " + name in dump(config)

    def test_is_documented_with_every_setting(self, name) -> None:
        root = Path(__file__).resolve().parents[2]
        text = (root / "docs" / "methods.md").read_text(encoding="utf-8")
        assert f"## {name}" in text
        section = text.split(f"## {name}")[1].split("\n## ")[0]
        for setting in fields(OBJECTIVES.load(name)):
            assert f"`{setting.name}`" in section
        assert "arXiv" in section


def test_what_an_objective_embeds_is_what_it_needs() -> None:
    objectives = [OBJECTIVES.load(name)() for name in TRAINED]
    assert any(isinstance(objective, Embedder) for objective in objectives)
    for objective in objectives:
        if isinstance(objective, Embedder):
            xl = Conditioning(torch.randn(2, 5, 6), torch.randn(2, 4), torch.ones(2, 6))
            for concept in (xl, Conditioning(xl.states)):
                made = objective.embeddings(concept, torch.Generator().manual_seed(0))
                for value in made.values():
                    assert value.states.shape == (2, 5, 6)
                    assert (value.pooled is None) == (concept.pooled is None)
                    assert value.sizes is concept.sizes
            known = {"concept", "null", "anchor", "made", *made}
            assert {need.split("/")[1] for need in objective.needs} <= known


@pytest.mark.parametrize("name", TRAINED)
class TestContract:
    def test_names_predictions_that_exist(self, name) -> None:
        objective = OBJECTIVES.load(name)()
        assert isinstance(objective, Objective)
        for need in objective.needs:
            network, prompt = need.split("/")
            assert network in NETWORKS or need in ("guided/concept", "noise/made", "twin/made")
            assert prompt in ("concept", "null", "anchor", "made") or isinstance(
                objective, Embedder
            )
        assert any(need.startswith("student/") for need in objective.needs)
        assert objective.modules in backbones.MODULE_GROUPS
        assert 0 <= objective.ema_decay < 1

    def test_gives_a_loss_for_each_sample_with_gradient_in_the_student_only(self, name) -> None:
        objective = OBJECTIVES.load(name)()
        predictions = {n: torch.randn(3, 4, 2, 2, requires_grad=True) for n in objective.needs}
        loss = objective.loss(predictions)
        assert loss.shape == (3,)
        loss.sum().backward()
        for need, value in predictions.items():
            if need.startswith("student/"):
                assert value.grad.abs().sum() > 0
        perfect = objective.loss(dict.fromkeys(objective.needs, torch.ones(1, 4, 2, 2)))
        assert perfect.item() == 0
