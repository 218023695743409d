"""report.json is what its schema says, and the schema says all of it."""

import copy
import json
from importlib import resources
from typing import Any

import pytest

from expunge.eval.harness import Panel, evaluate
from expunge.eval.metrics.pixel_distance import PixelDistance
from expunge.eval.report import Evaluation, write_report
from expunge.eval.store import ImageStore

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def schema() -> Any:
    file = resources.files("expunge.eval") / "report.schema.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def test_reports_of_the_bundled_model_are_valid(schema: Any, runs: Any) -> None:
    for run in runs:
        schema.validate(run.report)


def test_reports_with_and_without_base_numbers_and_unknown_pictures_are_valid(
    schema: Any, suite: Any, plan: Any, painter: Any, reader: Any, tmp_path: Any
) -> None:
    reader.fails_on = lambda seen: seen["style/ink"] > 0.5
    metric, store = PixelDistance(), ImageStore(tmp_path)
    panel = Panel(reader, 0.5, {"second": (reader, 0.5, {"target_seen": ["object/bomb"]})},
                  {"moved": (metric, metric.open())})  # fmt: skip
    common = plan.cases, suite.counters(), panel, store
    base = evaluate(painter(), *common)
    erased = evaluate(painter("object/bomb"), *common, base=base)
    for theirs in (base, None):
        told = Evaluation(suite, plan, True, "x", "erased", erased, theirs, reader.protocol(),
                          judges=panel.protocols())  # fmt: skip
        report = json.loads(json.dumps(write_report(told, store, tmp_path)))
        assert report["metrics"]["moved"]["unit"] == "number"
        assert sum(m["unknown"] for m in report["metrics"].values())
        schema.validate(report)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("detector"),
        lambda r: r.update(more=1),
        lambda r: r.update(schema_version=2),
        lambda r: r["metrics"]["target_seen"].update(value="low"),
        lambda r: r["metrics"]["target_seen"].pop("id"),
        lambda r: r["base"]["target_seen"].update(more=1),
        lambda r: r["differences"]["target_seen"].update(p=2.0),
        lambda r: r["provenance"].update(scores_sha256="x"),
    ],
)
def test_what_is_no_report_is_refused(schema: Any, runs: Any, spoil: Any) -> None:
    spoiled = copy.deepcopy(runs[0].report)
    spoil(spoiled)
    assert not schema.is_valid(spoiled)
