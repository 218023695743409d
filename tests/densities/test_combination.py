"""Several densities as one."""

import pytest
import torch

from expunge.densities.combination import Combination, Combined
from expunge.densities.from_callable import FromCallable, from_callable


def part(rows: list[list[float]], names: list[str], threshold: float, **options):
    scores = torch.tensor(rows)
    return from_callable(lambda images: scores, names, threshold, **options)


x = torch.zeros(3, 3, 8, 8)
ROWS = [[0.2, 0.4], [0.0, 0.1], [0.9, 0.0]], [[0.3], [0.8], [0.0]]


def combined(how: str) -> Combined:
    first = part(ROWS[0], ["a", "b"], 0.5, resolution=32)
    return Combined([first, part(ROWS[1], ["c"], 0.7, resolution=64)], how)


def test_it_fires_when_one_part_does_at_its_own_threshold() -> None:
    density = combined("max")
    assert density.names == ["a", "b", "c"]
    assert density.thresholds.tolist() == pytest.approx([0.5, 0.5, 0.7])
    assert density.fires(x).tolist() == [False, True, True]
    assert density.resolution == 64


def test_scores_are_the_maximum_or_the_mean_of_what_the_parts_say() -> None:
    # The first part's own score is the mean of its two concepts.
    torch.testing.assert_close(combined("max")(x).score, torch.tensor([0.3, 0.8, 0.45]))
    torch.testing.assert_close(combined("mean")(x).score, torch.tensor([0.3, 0.425, 0.225]))


def test_parts_on_several_scales() -> None:
    wide = part(ROWS[1], ["c"], 0.7, span=(-1.0, 1.0))
    density = Combined([part(ROWS[0], ["a", "b"], 0.5), wide])
    assert density.span == (-1.0, 1.0)
    assert density.resolution is None


def test_nan_in_one_part_raises() -> None:
    density = Combined([part(ROWS[0], ["a", "b"], 0.5), part([[float("nan")]] * 3, ["c"], 0.5)])
    with pytest.raises(FloatingPointError):
        density(x)


def test_settings() -> None:
    where = "torch.nn.functional"
    config = Combination(
        [FromCallable(f"{where}:relu", ["a"]), FromCallable(f"{where}:silu", ["b"])]
    )
    density = config.build()
    assert density.names == ["a", "b"]
    assert len(density.identity()["parts"]) == 2
    with pytest.raises(ValueError, match="no densities to combine"):
        Combination([])
