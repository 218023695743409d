"""generate → score → measure, in steps that can each be interrupted and repeated."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from expunge.errors import UserError, unknown_name
from expunge.eval.cases import Answer, Case, Observation, Question
from expunge.eval.detectors import OpenDetector
from expunge.eval.generators import Generator, threads
from expunge.eval.judging import Look, judge
from expunge.eval.metrics import Batch, Counter, PictureMetric, Tally
from expunge.eval.metrics.shares import share
from expunge.eval.production import produce, to_tensor
from expunge.eval.reasons import reason
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
        generated: Pictures that were made now rather than found, by all processes.
        judged: Second opinions: name of the judge -> one score for each case.
        protocols: How each metric that looks at pictures does it.
        failures: Of each of these, the places of the cases whose pictures it could not take in,
            and why.
        values: Of each of these that is a mean or a share, what each picture contributes: place of
            the case -> number; None is one that it could not take in.
        seconds: What took how long, from when the first process begins until all are through.
    """

    identity: dict[str, Any]
    scores: tuple[Score, ...]
    metrics: dict[str, Measurement]
    breakdown: dict[str, dict[str, Measurement]]
    generated: int
    judged: dict[str, tuple[Score, ...]] = field(default_factory=dict)
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, dict[int, str]] = field(default_factory=dict)
    values: dict[str, dict[int, Answer]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def answers(self, metric: str) -> dict[int, Answer]:
        """Place of the case -> answer or number, of all pictures that a metric has one of.

        `metric@judge` is a second opinion's.
        """
        if metric in self.protocols:
            return self.values.get(metric, {})
        name, _, by = metric.partition("@")
        scores = self.judged[by] if by else self.scores
        return {i: s.answers[name] for i, s in enumerate(scores) if name in s.answers}


@dataclass(frozen=True)
class Panel:
    """Who judges: detectors, and metrics that look at the pictures themselves.

    Attributes:
        detector: The suite's own.
        threshold: From which score on it sees something.
        others: The second opinions with their thresholds and questions.
        metrics: What looks at pictures: settings, and what is loaded.
    """

    detector: OpenDetector
    threshold: float
    others: dict[str, tuple[OpenDetector, float, dict[str, list[str]]]]
    metrics: dict[str, tuple[PictureMetric, Tally]] = field(default_factory=dict)

    @classmethod
    def open(cls, suite: Suite, *, metrics: bool = True) -> Panel:
        """Load all detectors of a suite, and all that its metrics need.

        Args:
            suite: The suite.
            metrics: Whether to open the metrics; of several processes one shows them pictures.

        Raises:
            UserError: Weights or a reference are missing, a detector lacks a label that it is asked
                for, or a metric names a group that the suite does not have.
        """
        looking = suite.picture_metrics()
        for name, metric in looking.items():
            for group in metric.groups:
                if group not in suite.groups:
                    raise unknown_name(f"group of metric {name}", group, suite.groups)
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
        opened = suite.detector.open()
        tallies = {name: (x, x.open()) for name, x in looking.items()} if metrics else {}
        return cls(opened, suite.detector.threshold, others, tallies)

    def protocols(self) -> dict[str, dict[str, Any]]:
        """Those of the second opinions."""
        return {name: opened.protocol() for name, (opened, _, _) in self.others.items()}

    def require(self, cases: Sequence[Case]) -> None:
        """Refuse questions that the detector cannot answer.

        Raises:
            UserError: It lacks a label.
        """
        _require({x for case in cases for q in case.questions for x in q.labels}, self.detector)


def evaluate(
    generator: Generator,
    cases: Sequence[Case],
    counters: Mapping[str, Counter],
    panel: Panel,
    store: ImageStore,
    *,
    base: Outcome | None = None,
    label: str = "model",
    team: Team = ALONE,
) -> Outcome | None:
    """Generate what the store lacks, judge every picture, count and measure.

    Args:
        generator: The model.
        cases: The pictures and the questions about them.
        counters: What is counted, by the names that the questions use.
        panel: Who judges and looks.
        store: Where pictures are kept; what is there is not made again.
        base: The base's, whose pictures metrics see beside these.
        label: The model's name beside the progress bar.
        team: The processes that share the work.

    Returns:
        None in all processes but the first.
    """
    questions = [q for case in cases for q in case.questions]
    panel.require(cases)
    if unknown := {q.metric for q in questions} - set(counters):
        raise ValueError(f"the suite has no metric {', '.join(sorted(unknown))}")
    clock = _Clock()
    for name, (_, tally) in panel.metrics.items():
        tally.begin(store.root)
        clock.lap(f"begin {name}")
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
    for name, (metric, tally) in panel.metrics.items():
        places = [i for i, c in enumerate(cases) if not metric.groups or c.group in metric.groups]
        measured, failed, values = look(tally, places, cases, keys, store, base)
        outcome.metrics[name] = measured
        outcome.protocols[name] = tally.protocol()
        outcome.failures[name] = failed
        if values is not None:
            outcome.values[name] = values
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
    """Every counter for each target, object or style that its pictures are about.

    A picture that is about several counts in each, so that rows may add up to more than all.
    """
    parts: dict[str, dict[str, list[tuple[bool | None, str]]]] = {name: {} for name in counters}
    for case, score in zip(cases, scores, strict=True):
        for name, answer in score.answers.items():
            for about in case.about:
                parts[name].setdefault(about, []).append((answer, case.prompt))
    return {
        name: {
            about: counters[name].compute([a for a, _ in rows], [prompt for _, prompt in rows])
            for about, rows in table.items()
        }
        for name, table in parts.items()
    }


def look(
    tally: Tally,
    places: Sequence[int],
    cases: Sequence[Case],
    keys: Sequence[str],
    store: ImageStore,
    base: Outcome | None,
) -> tuple[Measurement, dict[int, str], dict[int, Answer] | None]:
    """Show a metric the pictures of some places, in the order of the cases.

    Returns:
        The measurement; the places that are unknown, with the reason of each: what raises is
        unknown, picture by picture; and what each picture contributes, as `Outcome.values`.
    """
    theirs = [score.picture for score in base.scores] if base and tally.compares else None
    by_size: dict[tuple[int, ...], list[int]] = {}
    failed: dict[int, str] = {}
    for i in places:
        pixels = store.read(keys[i])
        if pixels is None:
            failed[i] = store.why(keys[i])
        else:
            by_size.setdefault(pixels.shape, []).append(i)
    with tqdm(total=len(places), desc="look", unit="image", disable=None) as bar, threads(1):
        for same in by_size.values():
            for start in range(0, len(same), AT_ONCE):
                part = same[start : start + AT_ONCE]
                failed |= _show(tally, part, cases, keys, store, theirs)
                bar.update(len(part))
        found = tally.compute()
    each = tally.each()
    values = (
        None
        if each is None
        else {
            i: None if i in failed else each[cases[i]]
            for i in places
            if i in failed or cases[i] in each
        }
    )
    if failed and values is not None and found.unit == "share":
        # As with a detector: a picture that could not be taken in may be either.
        holds = [None if value is None else bool(value) for value in values.values()]
        better = found.higher_is_better
        found = share([cases[i] for i in values], holds, higher_is_better=better)
    else:
        found = replace(found, unknown=found.unknown + len(failed))
    return found, failed, values


def _show(
    tally: Tally,
    places: Sequence[int],
    cases: Sequence[Case],
    keys: Sequence[str],
    store: ImageStore,
    base: Sequence[str] | None,
) -> dict[int, str]:
    """Show some pictures of one size; those that could not be taken in, and why."""
    try:
        images = to_tensor(_all(store, [keys[i] for i in places]))
        beside = None if base is None else to_tensor(_all(store, [base[i] for i in places]))
        tally.update(Batch(tuple(cases[i] for i in places), images, beside))
    except Exception as error:
        if len(places) == 1:
            return {places[0]: reason(error)}
        each = [_show(tally, [i], cases, keys, store, base) for i in places]
        return {i: why for one in each for i, why in one.items()}
    return {}


def _all(store: ImageStore, keys: Sequence[str]) -> list[Pixels]:
    found = []
    for key in keys:
        pixels = store.read(key)
        if pixels is None:
            raise ValueError(store.why(key))
        found.append(pixels)
    return found


def changed(
    cases: Sequence[Case], outcome: Outcome, base: Outcome, store: ImageStore
) -> dict[str, Measurement]:
    """Of each group, the pictures that differ from the base's of the same prompt and seed at all.

    A single bit counts: a sampler that leaves a trajectory alone leaves its picture alone.
    """
    parts: dict[str, list[tuple[Case, bool | None]]] = {}
    for case, ours, theirs in zip(cases, outcome.scores, base.scores, strict=True):
        one, other = store.read(ours.picture), store.read(theirs.picture)
        differs = None if one is None or other is None else not np.array_equal(one, other)
        parts.setdefault(case.group, []).append((case, differs))
    return {
        group: share([c for c, _ in found], [x for _, x in found], higher_is_better=False)
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
