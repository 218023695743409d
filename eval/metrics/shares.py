"""The share of pictures of which something holds, when a prompt has several."""

from __future__ import annotations

from collections.abc import Sequence

from expunge.eval.cases import Case
from expunge.eval.metrics.pictures import PictureSettings, clusters_of
from expunge.eval.significance import cluster_bootstrap
from expunge.results import Measurement, wilson


def share(settings: PictureSettings, cases: Sequence[Case], holds: Sequence[bool]) -> Measurement:
    """The share, with the wider of Wilson's interval and the cluster bootstrap's by prompt.

    Wilson's takes pictures for independent; the bootstrap of a share of 0 or 1 has no width.
    """
    n = len(holds)
    if not n:
        return settings.measurement(None, unit="share")
    low, high = wilson(sum(holds), n)
    inner = cluster_bootstrap([float(x) for x in holds], clusters_of(cases))
    interval = min(low, inner[0]), max(high, inner[1])
    return settings.measurement(sum(holds) / n, interval, n, "share")
