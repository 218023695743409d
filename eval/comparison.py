"""Evaluations beside each other: paired on the same (prompt, seed), corrected for many tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

from expunge.errors import UserError
from expunge.eval.cases import Answer
from expunge.eval.front import left_out, mean_interval
from expunge.eval.runs import BASE, Run
from expunge.eval.significance import (
    Paired,
    compare_answers,
    compare_numbers,
    compare_shares,
    holm,
    over_seeds,
)

Measured = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """What is compared: one evaluation, or several that differ in the training's seed alone.

    Attributes:
        name: What it is called.
        runs: Its evaluations.
    """

    name: str
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        identities = [run.report["generators"][run.label] for run in self.runs]
        for i, identity in enumerate(identities):
            if identity in identities[:i]:
                raise UserError(
                    f"got {self.runs[i].folder} as a training seed of {self.name}, the same model "
                    "as another of them; allowed: models of different trainings; remove it"
                )

    def metrics(self) -> dict[str, Measured]:
        """Each metric; of several trainings the mean.

        Pictures of one checkpoint share its luck, so the interval covers Student's over the
        trainings, and besides that of the mean of the checkpoints' own intervals. A mean of shares
        is one, so its interval ends at 0 and 1.
        """
        tables = [run.report["metrics"] for run in self.runs]
        if len(tables) == 1:
            return {name: dict(m) for name, m in tables[0].items()}
        return {
            name: _mean([table[name] for table in tables])
            for name in tables[0]
            if all(name in table for table in tables)
        }

    def answers(self, metric: str) -> dict[int, Answer]:
        """The answer or number of each picture; of several trainings the mean, yes being one.

        None: one of them could not be judged.
        """
        first, *others = [run.answers(metric) for run in self.runs]
        if not others:
            return first
        columns = {
            i: [answer, *(x[i] for x in others)]
            for i, answer in first.items()
            if all(i in x for x in others)
        }
        return {
            i: sum(x for x in given if x is not None) / len(given) if None not in given else None
            for i, given in columns.items()
        }


@dataclass(frozen=True)
class Difference:
    """One metric of one method against another's on the same pictures.

    Attributes:
        metric: The metric.
        of: The method.
        against: The other, which is subtracted.
        unit: Of the difference; a share's is in [-1, 1].
        higher_is_better: The metric's direction.
        test: How p was found; None where no two pictures are there to be paired.
        paired: Difference, interval, p and n; None without a pair that both could be judged on.
        unknown: Pairs left out because one of them could not be judged.
        p_holm: p, corrected for all tests of the comparison.
    """

    metric: str
    of: str
    against: str
    unit: str
    higher_is_better: bool
    test: str | None
    paired: Paired | None
    unknown: int
    p_holm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The stable keys of compare.json."""
        found = asdict(self)
        paired = found.pop("paired") or dict.fromkeys(("difference", "low", "high", "p", "n"))
        return found | paired


@dataclass(frozen=True)
class Comparison:
    """All that a comparison tells.

    Attributes:
        methods: What was compared, in the order of the command line.
        base: The base's evaluation; None where the runs have none, or not the same one.
        differences: Each method against the first and against the base.
        tests: How many p-values were corrected together.
        notes: What a reader has to know.
    """

    methods: tuple[Method, ...]
    base: Run | None
    differences: tuple[Difference, ...]
    tests: int
    notes: tuple[str, ...]

    @property
    def report(self) -> dict[str, Any]:
        """The first evaluation's report, for what all have in common."""
        return self.methods[0].runs[0].report

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The first evaluation's cases."""
        return self.methods[0].runs[0].rows

    def measured(self) -> dict[str, dict[str, Measured]]:
        """Column -> metric -> measurement, the base first."""
        base = {BASE: self.base.report["base"]} if self.base else {}
        return base | {method.name: method.metrics() for method in self.methods}

    def runs(self) -> dict[str, tuple[Run, str]]:
        """Column -> the evaluation whose pictures stand for it, and the model's key in it."""
        base = {BASE: (self.base, BASE)} if self.base else {}
        return base | {m.name: (m.runs[0], m.runs[0].label) for m in self.methods}


def compare(methods: Sequence[Method]) -> Comparison:
    """Compare every method with the first one and with the base.

    All p-values together are corrected by Holm's method.
    """
    runs = [run for method in methods for run in method.runs]
    base, note = _shared_base(runs)
    notes = [note] if note else []
    if any(run.report["smoke"] for run in runs):
        notes.append("smoke runs with --limit: these numbers are not comparable with any others")
    if any(len(method.runs) > 1 for method in methods):
        notes.append(
            "of methods with several trainings, intervals cover the trainings; tests take the mean "
            "of these very checkpoints on each picture; pictures are the first training's"
        )
    if old := [str(run.folder) for run in runs if not run.keeps_values]:
        notes.append(
            f"{', '.join(old)}: written before reports kept the numbers of single pictures, so its "
            "differences in the metrics that look at pictures are not known; evaluate it again"
        )
    first = methods[0]
    found = _differences(methods[1:], first.name, first.answers)
    if base is not None:
        found += _differences(methods, BASE, partial(base.answers, model=BASE))
    corrected = holm({str(k): d.paired.p for k, d in enumerate(found) if d.paired})
    differences = [replace(d, p_holm=corrected.get(str(k))) for k, d in enumerate(found)]
    made = Comparison(tuple(methods), base, tuple(differences), len(corrected), tuple(notes))
    looking = first.runs[0].report.get("protocols", {})
    left = left_out(made.measured(), BASE if base else None, looking)
    return replace(made, notes=(*notes, *left))


def _differences(
    methods: Sequence[Method],
    against: str,
    answers: Callable[[str], Mapping[int, Answer]],
) -> list[Difference]:
    theirs = cache(answers)  # asked once, not of each method
    found = []
    for method in methods:
        for name, m in method.metrics().items():
            ours, others = method.answers(name), theirs(name)
            # Of a distance between two sets no picture has a part, and there is nothing to pair.
            if both := [i for i in ours if i in others]:
                prompts = [method.runs[0].rows[i]["prompt"] for i in both]
                pairs = [others[i] for i in both], [ours[i] for i in both]
                found.append(_difference(method.name, against, name, m, pairs, prompts))
    return found


def _difference(
    of: str,
    against: str,
    name: str,
    m: Measured,
    pairs: tuple[Sequence[Answer], Sequence[Answer]],
    prompts: Sequence[str],
) -> Difference:
    theirs, ours = pairs
    unit = m.get("unit", "share")
    known = [None not in pair for pair in zip(theirs, ours, strict=True)]
    counted = unit == "share" and all(isinstance(x, bool) or x is None for x in (*theirs, *ours))
    shares: Any = compare_answers if counted else compare_shares
    pair: Any = shares if unit == "share" else compare_numbers
    paired: Paired | None = pair(theirs, ours, prompts)
    kept = [prompt for prompt, judged in zip(prompts, known, strict=True) if judged]
    exact = counted and len(set(kept)) == len(kept)
    test = "McNemar, exact" if exact else "permutation of prompts"
    if unit != "share":
        test = "paired permutation"
    return Difference(
        metric=name,
        of=of,
        against=against,
        unit=unit,
        higher_is_better=m["higher_is_better"],
        test=test if paired else None,
        paired=paired,
        unknown=known.count(False),
    )


def _mean(measured: Sequence[Measured]) -> Measured:
    values = [m["value"] for m in measured]
    first = measured[0]
    counts = {key: sum(m[key] for m in measured) for key in ("n", "unknown")}
    found = {**first, **counts, "checkpoints": values, "value": None, "low": None, "high": None}
    if None in values:
        return found
    mean, low, high = over_seeds(values)
    parts = [(m["value"], m["low"], m["high"]) for m in measured]
    if all(None not in part for part in parts):
        # Few trainings can agree by chance; their pictures are few too.
        _, least, most = mean_interval(parts)
        low, high = min(low, least), max(high, most)
    if first.get("unit", "share") == "share":
        low, high = max(0.0, low), min(1.0, high)
    return found | {"value": mean, "low": low, "high": high}


def _shared_base(runs: Sequence[Run]) -> tuple[Run | None, str | None]:
    """An evaluation that holds the base of all, if they have the same one."""
    having = [run for run in runs if run.report["base"] is not None]
    if not having:
        return None, "no evaluation holds a base, so nothing is compared with one"
    first = having[0].report["generators"][BASE]
    if any(run.report["generators"][BASE] != first for run in having):
        return None, "the evaluations have different bases, so nothing is compared with one"
    without = ", ".join(str(run.folder) for run in runs if run.report["base"] is None)
    if without:
        return having[0], f"{without}: evaluated without a base, and compared with the others' base"
    return having[0], None
