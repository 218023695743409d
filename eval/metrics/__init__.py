"""Metrics: counters that turn answers into numbers with intervals."""

from expunge.registry import Entry, Registry

METRICS = Registry(
    "metric",
    {
        "seen_rate": Entry(
            "expunge.eval.metrics.seen_rate:SeenRate",
            "share of pictures on which the detector sees what is asked, with Wilson's interval",
        ),
    },
)
