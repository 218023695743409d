"""Second judges, metrics that look at pictures, and that nothing is judged twice."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from expunge.errors import UserError
from expunge.eval.cases import Plan
from expunge.eval.emoji_vocabulary import Vocabulary
from expunge.eval.harness import Outcome, Panel, evaluate
from expunge.eval.metrics import Batch
from expunge.eval.report import Evaluation, markdown, to_dict, write_report
from expunge.eval.store import ImageStore
from expunge.eval.suite import Suite
from expunge.results import Measurement, wilson


@dataclass
class Brightness:
    """Mean brightness, beside the base's where it is there."""

    groups: list[str] = field(default_factory=list)
    higher_is_better: bool = True
    meaning: str = "brightness"
    chokes_on: Callable[[Batch], bool] = lambda batch: False
    compares = True

    def open(self) -> "Brightness":
        return self

    def begin(self, keep: Path | None = None) -> None:
        self.seen: list[float] = []
        self.base: list[float] = []
        self.order: list[str] = []

    def protocol(self) -> dict[str, Any]:
        return {"metric": "brightness"}

    def update(self, batch: Batch) -> None:
        if self.chokes_on(batch):
            raise RuntimeError("too pink")
        self.seen += batch.images.mean((1, 2, 3)).tolist()
        self.order += [case.prompt for case in batch.cases]
        if batch.base is not None:
            self.base += batch.base.mean((1, 2, 3)).tolist()

    def each(self) -> None:
        return None

    def compute(self) -> Measurement:
        value = sum(self.seen) / len(self.seen)
        return Measurement(value, value, value, len(self.seen), True, unit="number")


def run(suite: Suite, plan: Plan, model: Any, panel: Panel, root: Path, **more: Any) -> Outcome:
    found = evaluate(model, plan.cases, suite.counters(), panel, ImageStore(root), **more)
    assert found is not None
    return found


def test_a_picture_is_judged_once_whoever_asks(
    suite: Suite, plan: Plan, painter: Any, reader: Any, tmp_path: Path
) -> None:
    panel = Panel(reader, 0.5, {})
    first = run(suite, plan, painter(), panel, tmp_path)
    assert sum(reader.batches) >= len(plan.cases)
    assert set(reader.batches) == {16}
    reader.batches.clear()
    assert run(suite, plan, painter(), panel, tmp_path).scores == first.scores
    assert reader.batches == []


@pytest.fixture
def blind(reader: Any) -> Any:
    """Sees no bombs."""
    return type(reader)(Vocabulary.read(), ["object/bomb"])


ASKS = {"target_seen": ["object/bomb"]}


def test_a_second_judge_counts_beside_the_first(
    suite: Suite, plan: Plan, painter: Any, reader: Any, blind: Any, tmp_path: Path
) -> None:
    panel = Panel(reader, 0.5, {"blind": (blind, 0.5, ASKS)})
    found = run(suite, plan, painter(), panel, tmp_path)
    first, second = found.metrics["target_seen"], found.metrics["target_seen@blind"]
    assert (first.value, second.value, first.n) == (1.0, 0.0, second.n)
    assert [name for name in found.metrics if "@" in name] == ["target_seen@blind"]
    # It is shown the pictures that its questions are about, and no others.
    targets = [i for i, case in enumerate(plan.cases) if case.group == "target"]
    assert [i for i, s in enumerate(found.judged["blind"]) if s.seen is not None] == targets
    assert found.answers("target_seen@blind") == dict.fromkeys(targets, False)


def test_a_second_judge_that_fails_is_unknown(
    suite: Suite, plan: Plan, painter: Any, reader: Any, blind: Any, tmp_path: Path
) -> None:
    blind.fails_on = lambda seen: seen["style/ink"] > 0.5
    panel = Panel(reader, 0.5, {"blind": (blind, 0.5, ASKS)})
    base = run(suite, plan, painter(), panel, tmp_path)
    found = base.metrics["target_seen@blind"]
    assert found.unknown > 0
    assert found.high == wilson(found.unknown, found.n + found.unknown)[1]
    assert base.metrics["target_seen"].unknown == 0
    told = Evaluation(
        suite, plan, False, "x", "erased", base, base, reader.protocol(), judges=panel.protocols()
    )
    assert to_dict(told)["judges"]["blind"]["blind to"] == ["object/bomb"]
    assert f"{found.unknown} of" in markdown(told)


def test_a_metric_sees_the_pictures_of_its_groups_beside_the_bases(
    suite: Suite, plan: Plan, painter: Any, reader: Any, tmp_path: Path
) -> None:
    metric = Brightness(["target", "pair"])
    panel = Panel(reader, 0.5, {}, {"bright": (metric, metric)})
    base = run(suite, plan, painter(), panel, tmp_path)
    wanted = [case.prompt for case in plan.cases if case.group in ("target", "pair")]
    assert (metric.order, metric.base) == (wanted, [])
    before = metric.seen
    erased = run(suite, plan, painter("object/bomb"), panel, tmp_path, base=base)
    assert metric.base == before
    assert sum(metric.seen) < sum(before)
    assert erased.metrics["bright"].n == len(wanted)
    assert erased.protocols == {"bright": {"metric": "brightness"}}
    text = markdown(Evaluation(suite, plan, False, "x", "erased", erased, base, {}))
    value = erased.metrics["bright"].value
    assert f"{value:.4g} [{value:.4g}, {value:.4g}]" in text
    assert "bright" not in Evaluation(suite, plan, False, "", "e", erased, base, {}).differences


def test_a_picture_on_which_a_metric_fails_is_unknown(
    suite: Suite, plan: Plan, painter: Any, reader: Any, tmp_path: Path
) -> None:
    whole, choosy = Brightness(), Brightness()
    choosy.chokes_on = lambda batch: any("pink" in case.prompt for case in batch.cases)
    pink = sum("pink" in case.prompt for case in plan.cases)
    assert pink
    panel = Panel(reader, 0.5, {}, {"whole": (whole, whole), "choosy": (choosy, choosy)})
    found = run(suite, plan, painter(), panel, tmp_path)
    assert (found.metrics["whole"].n, found.metrics["whole"].unknown) == (len(plan.cases), 0)
    assert found.metrics["choosy"].unknown == pink
    assert found.metrics["choosy"].n == len(plan.cases) - pink
    places = [i for i, case in enumerate(plan.cases) if "pink" in case.prompt]
    assert found.failures == {
        "whole": {},
        "choosy": dict.fromkeys(places, "RuntimeError: too pink"),
    }


def test_why_a_metric_fails_is_told_with_its_count_and_beside_each_picture(
    suite: Suite, plan: Plan, painter: Any, reader: Any, tmp_path: Path
) -> None:
    def choke(batch: Batch) -> bool:
        if any("ink style" in case.prompt for case in batch.cases):
            raise FloatingPointError("got NaN from /home/someone/weights.pth\nand more")
        return any("pink" in case.prompt for case in batch.cases)

    choosy, store = Brightness(chokes_on=choke), ImageStore(tmp_path)
    panel = Panel(reader, 0.5, {}, {"choosy": (choosy, choosy)})
    found = run(suite, plan, painter(), panel, tmp_path)
    nan = "FloatingPointError: got NaN from …/weights.pth"
    count = {why: list(found.failures["choosy"].values()).count(why)
             for why in (nan, "RuntimeError: too pink")}  # fmt: skip
    assert all(count.values())
    told = Evaluation(suite, plan, True, "x", "model", found, None, reader.protocol())
    text = markdown(told)
    for why, n in count.items():
        assert f"{n} × {why}" in text
    write_report(told, store, tmp_path)
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    for i, row in enumerate(rows):
        why = found.failures["choosy"].get(i)
        assert row["model"].get("metric_errors") == (why and {"choosy": why})
    page = (tmp_path / "report.html").read_text()
    for why, n in count.items():
        # In the table of what is unknown, and in each picture's own sheet.
        assert f'<td data-label="pictures">{n}</td>' in page
        assert page.count(f">choosy: {why}</td>") == 1
        assert page.count(json.dumps(f"choosy: {why}")) == n
    assert "/home" not in page + text + (tmp_path / "scores.json").read_text()


def test_differences_are_paired_and_corrected_for_their_number(
    suite: Suite, plan: Plan, painter: Any, reader: Any, tmp_path: Path
) -> None:
    panel = Panel(reader, 0.5, {})
    base = run(suite, plan, painter(), panel, tmp_path)
    erased = run(suite, plan, painter("object/bomb"), panel, tmp_path)
    told = Evaluation(suite, plan, False, "x", "erased", erased, base, {})
    found = told.differences
    assert found["target_seen"].difference == -1.0
    # Twelve pairs that all disagree: 2 / 2^12, one of six tests.
    assert found["target_seen"].p == pytest.approx(6 * 2 / 2**12)
    assert found["kept_style"].difference == 0.0
    assert found["kept_style"].p == 1.0
    assert "| `target_seen` | -100.0 [-100.0, -58.7] | 0.0029 | 12 |" in markdown(told)
    assert Evaluation(suite, plan, False, "x", "model", erased, None, {}).differences == {}


def test_a_judge_that_is_asked_what_it_cannot_tell_is_one_line(suite: Suite) -> None:
    from dataclasses import replace

    from expunge.eval.suite import Judge

    for asks, said in (({"target_seen": ["object/x"]}, "asks for object/x"),
                       ({"nothing": ["object/bomb"]}, "asked for metric nothing")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            Panel.open(replace(suite, judges={"second": Judge(suite.detector, asks)}))
