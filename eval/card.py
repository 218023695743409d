"""What the hub shows of an evaluation: the `model-index` of a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from expunge.eval.display import interval, number


def model_index(report: Mapping[str, Any], model: str | None = None) -> str:
    """The front matter of a model card, `---` lines included, with every metric that has a value.

    A metric's name says what a number cannot do without: suite, version, n, interval, direction.

    Args:
        report: What report.json holds.
        model: The model's name; None: the report's title.

    Raises:
        ValueError: A smoke run, whose numbers compare with nothing.
    """
    if report["smoke"]:
        raise ValueError("got a smoke run; allowed: a whole one")
    suite = f"{report['suite']} version {report['version']}"
    rows = [
        EvalResult(
            task_type="text-to-image",
            task_name="Concept erasure",
            dataset_type=f"expunge/{report['suite']}",
            dataset_name=f"expunge suite {suite}, {', '.join(report['concept']['texts'])}",
            dataset_revision=report["suite_sha256"],
            dataset_args={"prompts_sha256": report["prompts_sha256"]},
            metric_type=name,
            metric_name=_name(m.get("id", name), suite, m),
            metric_value=m["value"],
            metric_args={key: m[key] for key in ("low", "high", "n", "unknown", "unit")},
        )
        for name, m in report["metrics"].items()
        if m["value"] is not None
    ]
    data = ModelCardData(model_name=model or report["title"], eval_results=rows or None)
    return f"---\n{data.to_yaml()}\n---\n"


def _name(name: str, suite: str, m: Mapping[str, Any]) -> str:
    better = "higher" if m["higher_is_better"] else "lower"
    unknown = f", {m['unknown']} unknown" if m["unknown"] else ""
    return f"{name} ({suite}, n = {m['n']}{unknown}; {number(m)} {interval(m)}; {better} is better)"
