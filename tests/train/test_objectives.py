"""The maths of the objectives, and one contract that every row of the table keeps."""

import random
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

from expunge import backbones
from expunge.concepts import Concept
from expunge.configuration import dump, parse
from expunge.train.config import TrainConfig
from expunge.train.objectives import OBJECTIVES
from expunge.train.objectives.base import ClosedForm, Objective, mse
from expunge.train.objectives.esd import Esd, esd_target
from expunge.train.objectives.hfi import Hfi
from expunge.train.objectives.sdd import Sdd, sdd_target
from expunge.train.predictions import NETWORKS

e0, ep = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
CONCEPT = Concept(targets=["a bomb", "a dagger"], templates=["{}", "{} in ink style"])


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
    rng = random.Random(0)
    drawn = [Sdd().prompts(CONCEPT, rng) for _ in range(50)]
    assert {made for made, _ in drawn} == {"a bomb, a dagger"}
    assert {learnt for _, learnt in drawn} == set(CONCEPT.prompts())
    made, learnt = Sdd(latents_prompt="single").prompts(CONCEPT, rng)
    assert made == learnt


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


@pytest.mark.parametrize("name", TRAINED)
class TestContract:
    def test_names_predictions_that_exist(self, name) -> None:
        objective = OBJECTIVES.load(name)()
        assert isinstance(objective, Objective)
        for need in objective.needs:
            network, prompt = need.split("/")
            assert network in NETWORKS or need == "guided/concept"
            assert prompt in ("concept", "null", "anchor")
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
