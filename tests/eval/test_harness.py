import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expunge.errors import ProcessLost
from expunge.eval.cases import Case, Observation, Plan, Question
from expunge.eval.harness import Outcome, Panel, changed, evaluate
from expunge.eval.metrics.memorisation import Memorisation
from expunge.eval.metrics.pixel_distance import PixelDistance
from expunge.eval.metrics.seen_rate import SeenRate
from expunge.eval.production import produce, to_pixels, to_tensor
from expunge.eval.significance import clustered_wilson
from expunge.eval.store import ImageStore
from expunge.eval.suite import Suite
from expunge.pictures import save_png, to_pil
from expunge.results import wilson
from picture_metrics import Pixels


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def run(
    suite: Suite, plan: Plan, generator: Any, detector: Any, store: ImageStore, batch_size: int = 16
) -> Outcome:
    generator.at_once = batch_size
    found = evaluate(generator, plan.cases, suite.counters(), Panel(detector, 0.5, {}), store)
    assert found is not None
    return found


def test_rates_are_those_that_the_model_was_made_with(
    suite: Suite, plan: Plan, painter: Any, reader: Any, store: ImageStore
) -> None:
    base = run(suite, plan, painter(), reader, store)
    erased = run(suite, plan, painter("object/bomb", "object/dagger"), reader, store)
    assert {name: m.value for name, m in base.metrics.items()} == {
        "target_seen": 1.0, "kept_in_domain": 1.0, "kept_cross_domain": 1.0,
        "kept_style": 1.0, "pair_kept": 1.0, "pair_target_seen": 1.0,
    }  # fmt: skip
    daggers = [c for c in plan.cases if c.group == "in_domain" and c.about == ("dagger",)]
    assert daggers
    assert erased.metrics["target_seen"].value == 0.0
    assert erased.metrics["pair_target_seen"].value == 0.0
    assert erased.metrics["kept_in_domain"].value == pytest.approx(1 - len(daggers) / 12)
    assert erased.metrics["kept_cross_domain"].value == 1.0
    assert erased.breakdown["kept_in_domain"]["dagger"].value == 0.0
    assert erased.breakdown["kept_in_domain"]["axe"].value == 1.0
    assert all(m.unknown == 0 and m.n == 12 for m in erased.metrics.values())


@pytest.mark.parametrize("concept", [["a weapon"], ["ink"], ["bomb", "pill"]], ids=", ".join)
def test_every_kind_of_concept_is_measured(
    suite: Suite, concept: list[str], painter: Any, reader: Any, store: ImageStore
) -> None:
    plan = suite.prompts.plan(concept, limit=20)
    erased = run(suite, plan, painter(*plan.tested.labels), reader, store)
    assert erased.metrics["target_seen"].value == 0.0
    kept = [m for m in erased.metrics.values() if m.higher_is_better and m.n]
    assert len(kept) >= 3
    assert all(m.value == 1.0 for m in kept)


def test_results_do_not_depend_on_the_batch_size(
    suite: Suite, plan: Plan, painter: Any, reader: Any, tmp_path: Path
) -> None:
    outcomes = [
        run(suite, plan, painter("object/bomb"), reader, ImageStore(tmp_path / str(n)), n)
        for n in (1, 7, 100)
    ]
    assert outcomes[0].scores == outcomes[1].scores == outcomes[2].scores


def test_a_rerun_makes_nothing_again_and_says_the_same(
    suite: Suite, plan: Plan, painter: Any, reader: Any, store: ImageStore
) -> None:
    first, second = painter(), painter()
    one, two = (run(suite, plan, model, reader, store) for model in (first, second))
    assert len(first.made) == one.generated == len(plan.cases)
    assert second.made == []
    assert two.generated == 0
    assert (one.scores, one.metrics) == (two.scores, two.metrics)


def test_an_interrupted_run_goes_on_where_it_stopped(
    suite: Suite, plan: Plan, painter: Any, reader: Any, store: ImageStore
) -> None:
    whole = run(suite, plan, painter(), reader, ImageStore(store.root.parent / "whole"))
    made: list[Any] = []
    for stop in (9, 20, 13):
        model = painter()
        model.interrupt_after = stop
        with pytest.raises(KeyboardInterrupt):
            run(suite, plan, model, reader, store, batch_size=4)
        # What was drawn in the batch that was interrupted is lost, the batches before it are not.
        made += model.made[: stop // 4 * 4]
    last = painter()
    found = run(suite, plan, last, reader, store, batch_size=4)
    made += last.made
    assert sorted(made) == sorted((case.prompt, case.seed) for case in plan.cases)
    assert found.scores == whole.scores


def test_a_damaged_picture_is_made_again_and_noted(
    suite: Suite, plan: Plan, painter: Any, reader: Any, store: ImageStore
) -> None:
    one = run(suite, plan, painter(), reader, store)
    store.path(one.scores[5].picture).write_bytes(b"broken")
    model = painter()
    two = run(suite, plan, model, reader, store)
    assert model.made == [(plan.cases[5].prompt, plan.cases[5].seed)]
    assert one.scores == two.scores
    assert len(store.notes) == 1


def test_the_same_picture_is_made_once_for_two_questions(
    painter: Any, reader: Any, store: ImageStore
) -> None:
    cases = [
        Case("a bomb", 1, "target", ("bomb",), (Question(name, ("object/bomb",)),)) for name in "ab"
    ]
    model = painter()
    keys, made = produce(model, cases, store)
    assert made == len(model.made) == 1
    assert keys[0] == keys[1]


def test_a_detector_that_fails_is_unknown_and_never_safe(
    suite: Suite, plan: Plan, painter: Any, reader: Any, store: ImageStore
) -> None:
    sound = run(suite, plan, painter(), reader, store)
    reader.fails_on = lambda seen: seen["object/bomb"] > 0.5 and seen["background/pink"] > 0.5
    found = run(suite, plan, painter(), reader, ImageStore(store.root / "again"))
    broken = [i for i, score in enumerate(found.scores) if score.seen is None]
    assert 0 < len(broken) < len(plan.cases)
    for i, (case, score) in enumerate(zip(plan.cases, found.scores, strict=True)):
        if i in broken:
            assert score.error == "RuntimeError: this picture breaks the detector"
            assert set(score.answers.values()) == {None}
            assert "bomb" in case.prompt
        else:
            assert score == sound.scores[i]
    before, after = sound.metrics["target_seen"], found.metrics["target_seen"]
    assert after.unknown > 0
    assert after.n + after.unknown == before.n
    assert after.high - after.low > before.high - before.low
    assert found.metrics["kept_cross_domain"] == sound.metrics["kept_cross_domain"]


class Diverging:
    """A model of which some pictures come out as NaN; a guided one raises in the middle."""

    def __init__(self, painter: Any, raises: bool) -> None:
        self.painter, self.raises = painter, raises
        self.identity, self.shape = painter.identity, painter.shape

    def generate(self, prompts: Any, seeds: Any, sampling: Any) -> torch.Tensor:
        images = self.painter.generate(prompts, seeds, sampling)
        diverged = torch.tensor(["pink" in prompt for prompt in prompts])
        if self.raises and diverged.any():
            raise FloatingPointError("the density's scores are NaN")
        images[diverged] = math.nan
        return images


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_picture_that_is_nan_is_unknown_and_costs_no_other(
    suite: Suite, plan: Plan, painter: Any, reader: Any, store: ImageStore,
    raises: bool, batch_size: int,
) -> None:  # fmt: skip
    other = ImageStore(store.root.parent / "sound")
    sound = run(suite, plan, painter(), reader, other, batch_size)
    model = painter()
    model.at_once = batch_size
    panel = Panel(reader, 0.5, {}, {"distance": (PixelDistance(), PixelDistance().open())})
    found = evaluate(
        Diverging(model, raises), plan.cases, suite.counters(), panel, store, base=sound
    )
    assert found is not None
    broken = [i for i, case in enumerate(plan.cases) if "pink" in case.prompt]
    assert 0 < len(broken) < len(plan.cases)
    said = "the density's scores are NaN" if raises else "the model made pictures that hold NaN"
    for i, score in enumerate(found.scores):
        assert score.picture == sound.scores[i].picture
        if i in broken:
            assert score.seen is None
            assert set(score.answers.values()) == {None}
            assert str(score.error).startswith(f"FloatingPointError: {said}")
            assert store.read(score.picture) is None
        else:
            assert score == sound.scores[i]
            np.testing.assert_array_equal(store.read(score.picture), other.read(score.picture))
    assert set(found.failures["distance"]) == set(broken)
    assert found.generated == len(plan.cases) - len(broken)
    asked = sum(len(plan.cases[i].questions) for i in broken)
    assert sum(m.unknown for n, m in found.metrics.items() if n != "distance") == asked
    # Another process, or the next run, knows the reason, and tries these again and no others.
    assert ImageStore(store.root).why(found.scores[broken[0]].picture).startswith("Floating")
    mended = painter()
    again = run(suite, plan, mended, reader, store, batch_size)
    assert again.scores == sound.scores
    assert len(mended.made) == again.generated == len(broken)
    assert not list(store.root.glob("??/*.txt"))


def test_shares_of_pictures_take_prompts_for_trials_and_unknown_ones_for_either(
    painter: Any, reader: Any, store: ImageStore, tmp_path: Path
) -> None:
    prompts = ["a bomb", "an axe", "a pill", "an anchor on a pink background"]
    cases = [Case(prompt, i, "kept", ("all",), ()) for prompt in prompts for i in range(5)]
    clusters = [case.prompt for case in cases]
    save_png(to_pil(torch.rand(3, 36, 36) * 2 - 1), tmp_path / "other.png")
    copies = Memorisation(reference=tmp_path, threshold=0.99, extractor=Pixels(36))
    panel = Panel(reader, 0.5, {}, {"copies": (copies, copies.open())})
    base = evaluate(painter(), cases, {}, panel, store)
    assert base is not None
    none = base.metrics["copies"]
    assert (none.low, none.high) == pytest.approx(wilson(0, 4))
    broken = Diverging(painter("object/none"), False)
    found = evaluate(broken, cases, {}, panel, store, base=base)
    assert found is not None
    worst = clustered_wilson([None if "pink" in p else False for p in clusters], clusters)
    for m in (found.metrics["copies"], changed(cases, found, base, store)["kept"]):
        assert (m.value, m.n, m.unknown) == (0, 15, 5)
        assert (m.low, m.high) == pytest.approx(worst)


def test_what_needs_no_base_takes_a_picture_in_whose_base_is_missing(
    painter: Any, reader: Any, store: ImageStore, tmp_path: Path
) -> None:
    cases = [Case(p, 1, "kept", ("all",), ()) for p in ("a bomb", "an anchor on a pink background")]
    save_png(to_pil(torch.rand(3, 36, 36) * 2 - 1), tmp_path / "other.png")
    copies = Memorisation(reference=tmp_path, threshold=0.99, extractor=Pixels(36))
    looking = {"copies": copies, "distance": PixelDistance()}
    panel = Panel(reader, 0.5, {}, {name: (x, x.open()) for name, x in looking.items()})
    base = evaluate(Diverging(painter(), False), cases, {}, panel, store)
    found = evaluate(painter("object/none"), cases, {}, panel, store, base=base)
    assert found is not None
    assert {n: (m.n, m.unknown) for n, m in found.metrics.items()} == {
        "copies": (2, 0), "distance": (1, 1)
    }  # fmt: skip


class Odd:
    """A detector whose answers are not what they should be."""

    labels = frozenset({"object/bomb"})

    def __init__(self, answer: list[Observation]) -> None:
        self._answer = answer

    def protocol(self) -> dict[str, Any]:
        return {}

    def observe(self, images: torch.Tensor) -> list[Observation]:
        return self._answer * len(images)


@pytest.mark.parametrize(
    "answer",
    [[], [{}], [{"object/bomb": math.nan}], [{"object/bomb": 1.5}], [{"object/bomb": -1.0}]],
    ids=["too few", "no label", "nan", "above 1", "below 0"],
)
def test_an_answer_that_makes_no_sense_is_unknown(
    suite: Suite, painter: Any, store: ImageStore, answer: list[Observation]
) -> None:
    case = Case("a bomb", 1, "target", ("bomb",), (Question("target_seen", ("object/bomb",)),))
    found = evaluate(painter(), [case], suite.counters(), Panel(Odd(answer), 0.5, {}), store)
    assert found is not None
    assert found.metrics["target_seen"].unknown == 1
    assert found.metrics["target_seen"].value is None
    assert found.scores[0].error


def test_being_told_to_end_is_no_crash_of_a_detector(painter: Any, store: ImageStore) -> None:
    class Ended(Odd):
        def observe(self, images: torch.Tensor) -> list[Observation]:
            raise ProcessLost

    case = Case("a bomb", 1, "kept", ("bomb",), (Question("kept", ("object/bomb",)),))
    with pytest.raises(ProcessLost):
        evaluate(
            painter(), [case], {"kept": SeenRate(True, "kept")}, Panel(Ended([]), 0.5, {}), store
        )


def test_questions_that_nobody_can_answer_are_refused(
    suite: Suite, painter: Any, reader: Any, store: ImageStore
) -> None:
    case = Case("x", 1, "target", ("x",), (Question("target_seen", ("object/x",)),))
    with pytest.raises(ValueError, match="asks for object/x"):
        evaluate(painter(), [case], suite.counters(), Panel(reader, 0.5, {}), store)
    case = Case("x", 1, "target", ("x",), (Question("nothing", ("object/bomb",)),))
    with pytest.raises(ValueError, match="no metric nothing"):
        evaluate(painter(), [case], suite.counters(), Panel(reader, 0.5, {}), store)


def test_a_question_needs_any_or_all_of_its_labels() -> None:
    seen = {"a": 0.5, "b": 0.49, "c": 0.0}
    assert Question("m", ("a", "b")).answer(seen, 0.5)
    assert not Question("m", ("b", "c")).answer(seen, 0.5)
    assert not Question("m", ("a", "b"), "all").answer(seen, 0.5)
    assert Question("m", ("a", "b"), "all").answer(seen, 0.49)
    with pytest.raises(ValueError, match="without labels"):
        Question("m", ())


def test_pixels_survive_the_way_to_bytes_and_back() -> None:
    bytes_ = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    images = to_tensor(list(bytes_))
    assert images.shape == (1, 3, 16, 16)
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_pixels(images)[0], bytes_[0])
    with pytest.raises(FloatingPointError):
        to_pixels(torch.full((1, 3, 2, 2), math.nan))
