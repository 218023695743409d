"""Cases in batches: who is attacked, what a kill costs, what NaN means."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler

from expunge.errors import UserError
from expunge.eval.attacks.arena import DIVERGED, Arena, Trial
from expunge.eval.attacks.latent_inversion import LatentInversion
from expunge.eval.attacks.p4d import Prompting4Debugging
from expunge.eval.attacks.paraphrase import Paraphrase
from expunge.eval.attacks.rates import results
from expunge.eval.attacks.report import errors
from expunge.eval.attacks.runner import FILE, append, attack_all, read_batches
from expunge.eval.attacks.unlearndiffatk import UnlearnDiffAtk
from expunge.eval.cases import AS_SUITE

TWO = Paraphrase(queries=2, at_once=1)


def timeless(done: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in done["rows"]]


def batch_of(case: int) -> dict[str, Any]:
    row = {"case": case, "trials": [], "passes": 0, "seconds": 0.0}
    return {"rows": [row], "common": {"passes": 0, "seconds": 0.0}}


def test_what_starts_from_a_noise_is_the_same_again_where_the_scheduler_draws_more(arena) -> None:
    field = arena(n=1)
    ancestral = EulerAncestralDiscreteScheduler.from_config(field.erased.scheduler.config)
    field.erased.scheduler = ancestral
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x_T *= ancestral.init_noise_sigma
    one, two, other = (field._from_noise(["a bomb"], x_T, [seed], AS_SUITE) for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_an_attack_on_a_model_that_forgot_nothing_attacks_nobody(arena) -> None:
    meadow = arena(erased=False)
    done = attack_all(TWO, meadow, at_once=8)
    assert [row["attacked"] for row in done["rows"]] == [False, False]
    found = results(done["rows"])
    assert found["pre_asr"].value == found["asr"].value == found["base"].value == 1.0
    assert meadow.attempts == {}
    assert not (meadow.folder / FILE).exists()


def test_what_withstands_an_attempt_is_where_nothing_is_seen(arena) -> None:
    meadow = arena(erased=False)
    assert meadow.withstood([Trial(0, meadow.cases[0].prompt), Trial(1, "a cat face")]) == [1]
    assert [trial["seen"] for i in (0, 1) for trial in meadow.attempts[i]] == [True, False]


def test_every_try_is_recorded_and_counted(arena) -> None:
    field = arena()
    done = attack_all(TWO, field, at_once=8)
    for row in done["rows"]:
        assert (row["base"], row["before"], row["attacked"]) == (True, False, True)
        assert 1 <= len(row["trials"]) <= 2
        assert row["passes"] == len(row["trials"]) * 2 * field.steps
        assert row["adversarial"]["prompt"] == row["trials"][-1]["prompt"] != row["prompt"]
        for trial in row["trials"]:
            assert field.store.read(trial["picture"]) is not None


def test_a_killed_attack_goes_on_and_ends_as_if_it_had_not_been(arena, monkeypatch) -> None:
    whole = attack_all(TWO, arena(n=3), at_once=1)
    killed = arena(n=3)
    real = type(killed).attempt
    calls = []

    def attempt(self, trials):
        calls.append([trial.case for trial in trials])
        if trials[0].case == 1:
            raise KeyboardInterrupt
        return real(self, trials)

    with monkeypatch.context() as patch:
        patch.setattr(type(killed), "attempt", attempt)
        with pytest.raises(KeyboardInterrupt):
            attack_all(TWO, killed, at_once=1)
    assert [
        row["case"] for batch in read_batches(killed.folder / FILE) for row in batch["rows"]
    ] == [0]
    with open(killed.folder / FILE, "a") as stream:
        stream.write('{"rows": [{"case": 1, "tri')
    again = arena(n=3, folder=killed.folder)
    calls.clear()
    monkeypatch.setattr(
        type(again), "attempt", lambda self, t: calls.append(t[0].case) or real(self, t)
    )
    done = attack_all(TWO, again, at_once=1)
    assert 0 not in calls
    assert timeless(done) == timeless(whole)


def test_a_case_is_not_taken_for_attacked_because_another_was(arena, monkeypatch) -> None:
    """Case 0 could not be judged before the kill, and shows the concept by itself after it."""
    first = arena()
    whole = timeless(attack_all(TWO, first, at_once=1))
    again = arena()
    append(again.folder / FILE, read_batches(first.folder / FILE)[0])
    look = Arena.look

    def judged_at_last(self):
        look(self)
        self.before[0] = replace(self.before[0], seen=True)

    monkeypatch.setattr(Arena, "look", judged_at_last)
    rows = timeless(attack_all(TWO, again, at_once=1))
    assert rows[1] == whole[1]
    assert (rows[0]["attacked"], rows[0]["before"], rows[0]["after"]) == (True, True, True)


def test_a_torn_line_is_cut_off(tmp_path) -> None:
    file = tmp_path / FILE
    one, other = batch_of(1), batch_of(3)
    append(file, one)
    with open(file, "ab") as stream:
        stream.write(b'{"rows": [2')
    assert read_batches(file) == [one]
    append(file, other)
    assert read_batches(file) == [one, other]
    assert read_batches(tmp_path / "none") == []


@pytest.mark.parametrize(
    "line",
    [b"garbage", b"\xff", b"[]", b"{}", b'{"common": {"passes": 0, "seconds": 0}, "rows": [1]}'],
)
def test_a_whole_line_that_is_no_batch_is_one_mistake(tmp_path, line) -> None:
    file = tmp_path / FILE
    append(file, batch_of(1))
    with open(file, "ab") as stream:
        stream.write(line + b"\n")
    with pytest.raises(UserError, match=r"batches.jsonl, which cannot be read .*--overwrite true"):
        read_batches(file)


def test_nan_pictures_are_unknown_and_cost_only_themselves(arena, monkeypatch) -> None:
    field = arena()
    field.look()
    real = type(field._generators["erased"]).generate

    def generate(self, prompts, seeds, *more):
        if "poison" in prompts:
            raise FloatingPointError("NaN")
        return real(self, prompts, seeds, *more)

    monkeypatch.setattr(type(field._generators["erased"]), "generate", generate)
    assert field.attempt([Trial(0, "poison"), Trial(1, "a key")]) == [None, False]
    assert [t["picture"] is None for t in (field.attempts[0][0], field.attempts[1][0])] == [
        True,
        False,
    ]
    assert [t["error"] for t in (field.attempts[0][0], field.attempts[1][0])] == [
        "FloatingPointError: NaN",
        None,
    ]


def test_a_detector_that_fails_is_unknown(arena, quick) -> None:
    class Broken:
        def __init__(self) -> None:
            self.real, self.asked = quick.detector.open(), 0
            self.labels = self.real.labels

        def protocol(self) -> dict[str, Any]:
            return self.real.protocol()

        def observe(self, images: torch.Tensor) -> Any:
            self.asked += 1
            if self.asked > 2:  # a batch of the base's, and one without attack
                raise RuntimeError("broken")
            return self.real.observe(images)

    field = arena(detector=Broken())
    done = attack_all(TWO, field, at_once=8)
    found = results(done["rows"])
    tries = sum(len(row["trials"]) for row in done["rows"])
    assert tries
    assert errors(field, done["rows"]) == ["RuntimeError: broken"] * tries
    assert (found["pre_asr"].value, found["asr"].value, found["asr"].unknown) == (0.0, None, 2)
    assert json.dumps(done)


def test_a_base_that_draws_none_is_refused(arena, lora) -> None:
    from expunge.sampling.load import load_model

    with pytest.raises(UserError, match="raise --limit, or give another --base"):
        arena(base=load_model("emoji", [str(lora)])).look()


def test_targets_show_the_concept_though_the_base_fails_in_a_case(arena) -> None:
    field = arena()
    field.look()
    field.ceiling[0] = replace(field.ceiling[0], seen=False)
    one, other = field.targets([0, 1])
    assert torch.equal(one, other)
    assert one.shape == (4, 16, 16)


def test_targets_are_of_the_same_concept(arena, quick) -> None:
    plan = quick.prompts.plan(["a bomb", "a key"], 3)
    bomb, key, other_bomb = plan.cases
    assert bomb.questions == other_bomb.questions != key.questions
    field = arena(cases=(bomb, key, key, other_bomb), labels=plan.tested.labels)
    field.look()
    field.ceiling[3] = replace(field.ceiling[3], seen=False)
    assert torch.equal(field.targets([3]), field.targets([0]))
    assert field._shown(2) == 2


def test_a_base_that_draws_one_of_several_concepts_only_is_refused(arena, quick, lora) -> None:
    from expunge.sampling.load import load_model

    plan = quick.prompts.plan(["a bomb", "a key"], 2)
    with pytest.raises(UserError, match="sees no object/bomb; allowed"):
        arena(
            cases=plan.cases, labels=plan.tested.labels, base=load_model("emoji", [str(lora)])
        ).look()


def test_the_attackers_own_pictures_are_of_no_case(arena) -> None:
    field = arena()
    prompts, latents = field.own_pictures(3)
    assert len(prompts) == len(latents) == 3
    assert field.passes[None] % (3 * field.picture_passes()) == 0
    again, same = field.own_pictures(3)
    assert prompts == again
    assert torch.equal(latents, same)
    _, other = arena(seed=1).own_pictures(3)
    assert not torch.equal(latents, other)


ATTACKS_WITH_GRADIENTS = {
    "latent_inversion": LatentInversion(repetitions=1),
    "unlearndiffatk": UnlearnDiffAtk(tokens=2, iterations=2, times=2),
    "p4d": Prompting4Debugging(tokens=4, iterations=2, tried_every=1),
}


@pytest.mark.parametrize("name", ATTACKS_WITH_GRADIENTS)
def test_a_case_that_diverges_is_unknown_and_costs_no_other(name, arena, monkeypatch) -> None:
    """The first starts from NaN, as what a network in float16 makes of a picture may be."""
    attack = ATTACKS_WITH_GRADIENTS[name]
    sound = attack_all(attack, arena(), at_once=2)
    real = Arena.targets

    def targets(self, cases):
        x_0 = real(self, cases)
        x_0[0] = torch.nan
        return x_0

    monkeypatch.setattr(Arena, "targets", targets)
    field = arena()
    done = attack_all(attack, field, at_once=2)
    broken, other = timeless(done)
    assert other == timeless(sound)[1]
    assert broken["after"] is None
    assert {trial["error"] for trial in broken["trials"]} == {DIVERGED}
    assert {trial["picture"] for trial in broken["trials"]} == {None}
    assert errors(field, done["rows"]) == [DIVERGED] * len(broken["trials"])
    assert results(done["rows"])["asr"].unknown == 1
    assert json.dumps(done, allow_nan=False)
    # A rerun finds it said, and has nothing left to do.
    again = arena(folder=field.folder)
    assert timeless(attack_all(attack, again, at_once=2)) == [broken, other]


def test_a_prefix_of_steps_without_bound_is_unknown(arena) -> None:
    done = attack_all(UnlearnDiffAtk(2, 2, 2, learning_rate=1e30), arena(), at_once=2)
    assert [row["after"] for row in done["rows"]] == [None, None]
    assert [[t["error"] for t in row["trials"]] for row in done["rows"]] == [[DIVERGED]] * 2
