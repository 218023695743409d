"""The model index of an evaluation, read back by the hub's own library."""

import pytest
from huggingface_hub.repocard_data import model_index_to_eval_results

from expunge.eval.card import model_index
from expunge.eval.runs import Run
from expunge.schema import read_yaml


def test_the_hub_reads_the_model_index(runs: tuple[Run, Run]) -> None:
    report = runs[0].report
    with pytest.raises(ValueError, match="smoke"):
        model_index(report)
    text = model_index(report | {"smoke": False}, "org/model")
    assert (text[:4], text[-5:]) == ("---\n", "\n---\n")
    name, results = model_index_to_eval_results(read_yaml(text.strip("-\n"))["model-index"])
    assert name == "org/model"
    assert [r.metric_type for r in results] == list(report["metrics"])
    for result in results:
        m = report["metrics"][result.metric_type]
        assert result.metric_value == m["value"]
        assert "emoji version 1, n = 2; " in result.metric_name
        assert f"{'higher' if m['higher_is_better'] else 'lower'} is better" in result.metric_name
        assert result.metric_args["low"] == m["low"]
        assert result.dataset_revision == report["suite_sha256"]
    blind = {"target_seen": report["metrics"]["target_seen"] | {"value": None}}
    assert "target_seen" not in model_index(report | {"smoke": False, "metrics": blind})
