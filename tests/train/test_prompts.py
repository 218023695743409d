"""Every prompt that a run can draw is known before; one that would be cut off is refused."""

import dataclasses
import random
from itertools import islice, permutations, product

import pytest

from expunge.concepts import Concept
from expunge.densities.from_callable import FromCallable
from expunge.errors import UserError
from expunge.train.objectives.ablation import Ablation
from expunge.train.objectives.density import Density
from expunge.train.objectives.esd import Esd
from expunge.train.objectives.sdd import Sdd
from expunge.train.objectives.slider import Slider
from expunge.train.objectives.spm import Spm
from expunge.train.preserve import Preserve
from expunge.train.prompts import outcomes, prompts_of
from expunge.train.several import Several, Turns
from expunge.train.train_erase import train
from small_runs import ANCHORED, KINDS, small_run


def test_every_way_to_draw_is_met_once() -> None:
    def draw(rng: random.Random) -> tuple:
        many = rng.choice("ab") if rng.random() < 0.5 else "none"
        order = [1, 2, 3]
        rng.shuffle(order)
        return many, tuple(order)

    expected = product(["a", "b", "none"], permutations([1, 2, 3]))
    assert sorted(outcomes(draw)) == sorted(expected)
    assert list(outcomes(lambda rng: rng.random() < 0.0)) == [False, False]
    assert list(outcomes(lambda rng: rng.random() < 1.0)) == [True, True]
    assert list(outcomes(lambda rng: 3)) == [3]


@pytest.mark.parametrize("name", KINDS)
def test_what_a_run_draws_is_what_it_can_draw(name, tmp_path) -> None:
    run = small_run("no model", tmp_path, **KINDS[name])
    whole = getattr(run.objective, "latents_prompt", "single") == "joined"
    turns, rng = Turns(run.several, run.concept, whole), random.Random(0)
    drawn = {run.concept.neutral}
    for turn in islice(turns.deal(rng), 500):
        made, prompt = run.objective.prompts(turn, rng)
        drawn |= {made, prompt}
        if "teacher/anchor" in run.objective.needs:
            drawn.add(turns.anchored(prompt))
        drawn |= {text for pair in run.preserve.prompts(run.concept, rng) for text in pair}
    assert set(prompts_of(run, turns)) == drawn


def test_a_prompt_whose_end_nobody_reads_is_not_erased(tiny_sd1, tmp_path) -> None:
    concept = Concept(targets=["a bomb"], templates=["a picture of " * 20 + "{}"])
    with pytest.raises(UserError, match=r"tokens .* shorten it"):
        train(small_run(tiny_sd1, tmp_path / "out", concept=concept, preserve=Preserve()))
    assert not (tmp_path / "out").exists()


LONG = "a picture of " * 20
TWELVE = Concept(targets=[f"a {bomb} bomb" for bomb in "abcdefghijkl"], preserve=["a cat face"])
WIDE = Concept(targets=["a bomb" + " key" * 18], preserve=["a cat face"])  # 22 tokens of 24


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": Esd(), "concept": TWELVE, "several": Several(order="joined")},
        {"objective": Sdd(), "concept": TWELVE},
        {"objective": Density(density=FromCallable("torch:zeros")), "concept": TWELVE},
        {"objective": Esd(erase_from=LONG)},
        {"objective": Slider(subject=LONG)},
        {"objective": Slider(attributes=[LONG + "{}"])},
        {"objective": Ablation(), "concept": dataclasses.replace(ANCHORED, anchor=LONG)},
        {"objective": Spm(), "concept": dataclasses.replace(ANCHORED, anchor=LONG)},
        {"objective": Esd(), "concept": dataclasses.replace(ANCHORED, neutral=LONG)},
        {"preserve": Preserve(weight=1.0, templates=["{}", LONG + "{}"])},
        {"preserve": Preserve(weight=1.0, pairs=0.5), "concept": WIDE},
    ],
)
def test_no_prompt_that_can_come_is_too_long(tiny_sd1, tmp_path, changes) -> None:
    with pytest.raises(UserError, match=r"tokens .* shorten it"):
        train(small_run(tiny_sd1, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
