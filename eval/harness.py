"""generate → score → measure, in steps that can each be interrupted and repeated."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from expunge.errors import UserError
from expunge.eval.cases import Case, Observation, Question
from expunge.eval.detectors import OpenDetector
from expunge.eval.generators import Generator, threads
from expunge.eval.judging import Look, judge
from expunge.eval.metrics import Batch, Counter, PictureMetric, Tally
from expunge.eval.production import produce, to_tensor
from expunge.eval.store import ImageStore, Pixels
from expunge.eval.suite import Suite
from expunge.eval.team import ALONE, Team
from expunge.results import Measurement

AT_ONCE = 16


@dataclass(frozen=True)
class Score:
    """What a detector says about the picture of one case.

    Attributes:
        picture: Its key in the store.
        seen: The detector's scores; None when it could not judge.
        error: Why it could not.
        answers: Metric -> the answer to its question; None is unknown, never "not seen".
    """

    picture: str
    seen: Observation | None
    error: str | None
    answers: dict[str, bool | None]


@dataclass(frozen=True)
class Outcome:
    """One model under evaluation.

    Attributes:
        identity: What its pictures depend on.
        scores: One for each case, in order.
        metrics: What was measured.
        breakdown: What was counted, for each target, object or style: metric -> about -> rate.
        generated: Pictures that were made now rather than found.
        judged: Second opinions: name of the judge -> one score for each case.
        protocols: How each metric that looks at pictures does it.
        seconds: What took how long.
    """

    identity: dict[str, Any]
    scores: tuple[Score, ...]
    metrics: dict[str, Measurement]
    breakdown: dict[str, dict[str, Measurement]]
    generated: int
    judged: dict[str, tuple[Score, ...]] = field(default_factory=dict)
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def answers(self, metric: str) -> list[tuple[int, bool | None]]:
        """(place of the case, answer) of all that a metric counted, `metric@judge` included."""
        name, _, by = metric.partition("@")
        scores = self.judged[by] if by else self.scores
        return [(i, s.answers[name]) for i, s in enumerate(scores) if name in s.answers]


@dataclass(frozen=True)
class Panel:
    """Who judges: the suite's detector, and the second opinions with their questions."""

    detector: OpenDetector
    threshold: float
    others: dict[str, tuple[OpenDetector, float, dict[str, list[str]]]]

    @classmethod
    def open(cls, suite: Suite) -> Panel:
        """Load all detectors of a suite.

        Raises:
            UserError: A detector's weights are missing, or it lacks a label that it is asked for.
        """
        others = {}
        for name, second in suite.judges.items():
            opened = second.detector.open()
            _require({label for x in second.asks.values() for label in x}, opened)
            if unknown := set(second.asks) - set(suite.counters()):
                raise UserError(
                    f"got judge {name} asked for metric {min(unknown)}; allowed: those of the "
                    f"suite that count answers: {', '.join(suite.counters())}"
                )
            others[name] = (opened, second.detector.threshold, second.asks)
        return cls(suite.detector.open(), suite.detector.threshold, others)

    def protocols(self) -> dict[str, dict[str, Any]]:
        """Those of the second opinions."""
        return {name: opened.protocol() for name, (opened, _, _) in self.others.items()}


def evaluate(
    generator: Generator,
    cases: Sequence[Case],
    counters: Mapping[str, Counter],
    panel: Panel,
    store: ImageStore,
    *,
    pictures: Mapping[str, PictureMetric] | None = None,
    base: Outcome | None = None,
    label: str = "model",
    team: Team = ALONE,
) -> Outcome | None:
    """Generate what the store lacks, judge every picture, count and measure.

    Args:
        generator: The model.
        cases: The pictures and the questions about them.
        counters: What is counted, by the names that the questions use.
        panel: The judges.
        store: Where pictures are kept; what is there is not made again.
        pictures: What looks at the pictures themselves.
        base: The base's, whose pictures such metrics see beside these.
        label: The model's name beside the progress bar.
        team: The processes that share the work.

    Returns:
        None in all processes but the first.
    """
    questions = [q for case in cases for q in case.questions]
    _require({label for q in questions for label in q.labels}, panel.detector)
    if unknown := {q.metric for q in questions} - set(counters):
        raise ValueError(f"the suite has no metric {', '.join(sorted(unknown))}")
    clock = _Clock()
    keys, generated = produce(generator, cases, store, label=label, team=team)
    clock.lap("generate")
    asked = [case.questions for case in cases]
    judged = {"": _scores(keys, asked, panel.detector, panel.threshold, store, label, team)}
    clock.lap("detector")
    for name, (detector, threshold, asks) in panel.others.items():
        reworded = [tuple(_reworded(case, asks)) for case in cases]
        judged[name] = _scores(keys, reworded, detector, threshold, store, f"{label} {name}", team)
        clock.lap(f"judge {name}")
    if not team.leads:
        return None
    scores = judged.pop("")
    outcome = Outcome(
        identity=generator.identity(),
        scores=scores,
        metrics=measure(cases, scores, counters),
        breakdown=break_down(cases, scores, counters),
        generated=generated,
        judged=judged,
    )
    for name, theirs in judged.items():
        some = {metric: counters[metric] for metric in panel.others[name][2]}
        found = measure(cases, theirs, some)
        outcome.metrics.update({f"{metric}@{name}": m for metric, m in found.items()})
    for name, metric in (pictures or {}).items():
        outcome.metrics[name], outcome.protocols[name] = look(metric, cases, keys, store, base)
        clock.lap(name)
    outcome.seconds.update(clock.laps)
    return outcome


def _require(asked: set[str], detector: OpenDetector) -> None:
    if missing := asked - detector.labels:
        raise UserError(
            f"got a suite that asks for {', '.join(sorted(missing))}; allowed: what its detector "
            f"tells: {', '.join(sorted(detector.labels)[:8])}…"
        )


def _reworded(case: Case, asks: Mapping[str, list[str]]) -> Iterator[Question]:
    for question in case.questions:
        if question.metric in asks:
            yield Question(question.metric, tuple(asks[question.metric]))


def _scores(
    keys: Sequence[str],
    asked: Sequence[Sequence[Question]],
    detector: OpenDetector,
    threshold: float,
    store: ImageStore,
    label: str,
    team: Team,
) -> tuple[Score, ...]:
    wanted = [key for key, questions in zip(keys, asked, strict=True) if questions]
    looks = judge(wanted, detector, store, label=label, team=team)
    found = []
    for key, questions in zip(keys, asked, strict=True):
        look = looks.get(key, Look(None))
        answers = {
            q.metric: None if look.seen is None else q.answer(look.seen, threshold)
            for q in questions
        }
        found.append(Score(key, look.seen, look.error, answers))
    return tuple(found)


def measure(
    cases: Sequence[Case], scores: Sequence[Score], counters: Mapping[str, Counter]
) -> dict[str, Measurement]:
    """Every counter over all of its answers."""
    found = {}
    for name, counter in counters.items():
        rows = [(s.answers[name], c.prompt) for c, s in zip(cases, scores, strict=True)
                if name in s.answers]  # fmt: skip
        found[name] = counter.compute([a for a, _ in rows], [prompt for _, prompt in rows])
    return found


def break_down(
    cases: Sequence[Case], scores: Sequence[Score], counters: Mapping[str, Counter]
) -> dict[str, dict[str, Measurement]]:
    """Every counter for each target, object or style that its pictures are about."""
    parts: dict[str, dict[str, list[tuple[bool | None, str]]]] = {name: {} for name in counters}
    for case, score in zip(cases, scores, strict=True):
        for name, answer in score.answers.items():
            parts[name].setdefault(case.about, []).append((answer, case.prompt))
    return {
        name: {
            about: counters[name].compute([a for a, _ in rows], [prompt for _, prompt in rows])
            for about, rows in table.items()
        }
        for name, table in parts.items()
    }


def look(
    metric: PictureMetric,
    cases: Sequence[Case],
    keys: Sequence[str],
    store: ImageStore,
    base: Outcome | None,
) -> tuple[Measurement, dict[str, Any]]:
    """Show a metric the pictures of its groups, in the order of the cases.

    Returns:
        The measurement, and how it was taken. What raises is unknown, picture by picture.
    """
    tally, unknown = metric.open(), 0
    theirs = [score.picture for score in base.scores] if base else None
    places = [i for i, case in enumerate(cases) if not metric.groups or case.group in metric.groups]
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i in places:
        pixels = store.read(keys[i])
        if pixels is None:
            unknown += 1
        else:
            by_size.setdefault(pixels.shape, []).append(i)
    with tqdm(total=len(places), desc="look", unit="image", disable=None) as bar, threads(1):
        for same in by_size.values():
            for start in range(0, len(same), AT_ONCE):
                part = same[start : start + AT_ONCE]
                unknown += _show(tally, part, cases, keys, store, theirs)
                bar.update(len(part))
        found = tally.compute()
    return replace(found, unknown=found.unknown + unknown), tally.protocol()


def _show(
    tally: Tally,
    places: Sequence[int],
    cases: Sequence[Case],
    keys: Sequence[str],
    store: ImageStore,
    base: Sequence[str] | None,
) -> int:
    """Show some pictures of one size; the number of those that could not be taken in."""
    try:
        images = to_tensor(_all([store.read(keys[i]) for i in places]))
        beside = None if base is None else to_tensor(_all([store.read(base[i]) for i in places]))
        tally.update(Batch(tuple(cases[i] for i in places), images, beside))
    except Exception:
        if len(places) == 1:
            return 1
        return sum(_show(tally, [i], cases, keys, store, base) for i in places)
    return 0


def _all(pictures: Sequence[Pixels | None]) -> list[Pixels]:
    found = [picture for picture in pictures if picture is not None]
    if len(found) < len(pictures):
        raise ValueError("a picture is missing or damaged")
    return found


def changed(
    cases: Sequence[Case], outcome: Outcome, base: Outcome, store: ImageStore
) -> dict[str, Measurement]:
    """Of each group, the pictures that differ from the base's of the same prompt and seed at all.

    A single bit counts: a sampler that leaves a trajectory alone leaves its picture alone.
    """
    parts: dict[str, list[bool | None]] = {}
    for case, ours, theirs in zip(cases, outcome.scores, base.scores, strict=True):
        one, other = store.read(ours.picture), store.read(theirs.picture)
        differs = None if one is None or other is None else not np.array_equal(one, other)
        parts.setdefault(case.group, []).append(differs)
    return {
        group: Measurement.proportion(
            sum(map(bool, found)),
            len(found) - found.count(None),
            higher_is_better=False,
            unknown=found.count(None),
        )
        for group, found in parts.items()
    }


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 1)
        self._last = now
