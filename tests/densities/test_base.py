"""The contract: who fires, what is refused, and that thresholds are read as people write them."""

import linecache
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.densities.base import Harm
from expunge.densities.from_callable import FromCallable, from_callable
from expunge.densities.thresholds import check_threshold, check_top_k, spread_threshold
from expunge.errors import UserError

x = torch.zeros(3, 3, 8, 8)


def fixed(rows: list[list[float]], names: list[str], threshold: list[float]):
    scores = torch.tensor(rows)
    return from_callable(lambda images: scores[: len(images)], names, threshold)


def test_it_fires_when_any_concept_reaches_its_own_threshold() -> None:
    density = fixed([[0.1, 0.8], [0.3, 0.0], [0.29, 0.79]], ["a", "b"], [0.3, 0.8])
    assert density.fires(x).tolist() == [True, True, False]
    assert density(x).exceeds(0.79).tolist() == [True, False, True]
    assert density(x).exceeds(math.inf).tolist() == [False] * 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_is_never_safe(value: float) -> None:
    density = fixed([[0.1], [value], [0.1]], ["a"], [0.5])
    with pytest.raises(FloatingPointError, match="nothing can be said"):
        density(x)
    with pytest.raises(FloatingPointError):
        Harm(torch.tensor([value]), torch.zeros(1, 1))


def test_scores_and_pictures_of_the_wrong_shape_raise() -> None:
    density = fixed([[0.1], [0.2], [0.3]], ["a", "b"], [0.5])
    with pytest.raises(ValueError, match=r"scores of shape \(3, 1\); allowed: \(3, 2\)"):
        density(x)
    with pytest.raises(ValueError, match="pictures of shape"):
        density(x[0])


def test_a_function_of_one_score_per_picture_will_do() -> None:
    density = from_callable(lambda images: images.mean((1, 2, 3)).sigmoid(), ["light"], 0.6)
    light = torch.stack([torch.ones(3, 8, 8), -torch.ones(3, 8, 8)]).requires_grad_()
    assert density.fires(light).tolist() == [True, False]
    density(light).score.sum().backward()
    assert (light.grad > 0).all()


def test_a_function_by_name() -> None:
    density = FromCallable("expunge.densities.thresholds:one_or_more").build()
    assert list(density.names) == ["one_or_more"]
    assert density.identity()["function"] == "expunge.densities.thresholds:one_or_more"
    for name in ("torch:no_such", "no_such_module:f", "torch:float32"):
        with pytest.raises(UserError, match=f"got (function )?{name}"):
            FromCallable(name).build()


def test_a_function_is_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(source: str) -> dict[str, Any]:
        (tmp_path / "my_scores.py").write_text(f"def score(x):\n    return {source}\n")
        linecache.clearcache()
        sys.modules.pop("my_scores", None)
        return FromCallable("my_scores:score").build().identity()

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert identity("x.mean()") == identity("x.mean()")
    assert identity("x.mean()") != identity("x.amax()")
    sys.modules.pop("my_scores")
    with pytest.raises(UserError, match="whose source cannot be read"):
        FromCallable("torch:abs").build().identity()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"function": "torch"}, "module:function"),
        ({"function": "torch:abs", "threshold": 1.5}, "got threshold 1.5; allowed: 0 to 1"),
        ({"function": "torch:abs", "span": (1.0, 0.0)}, "got span"),
    ],
)
def test_wrong_settings_of_a_function(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FromCallable(**settings)


def test_thresholds_are_one_for_all_or_one_for_each() -> None:
    assert spread_threshold(0.5, ["a", "b"]).tolist() == [0.5, 0.5]
    assert spread_threshold([0.25, 0.5], ["a", "b"]).tolist() == [0.25, 0.5]
    with pytest.raises(UserError, match=r"got 3 thresholds for 2 concepts \(a, b\)"):
        spread_threshold([0.1, 0.2, 0.3], ["a", "b"])


@pytest.mark.parametrize("threshold", [1.2, -1.2, math.nan, math.inf, [0.1, 7.0], []])
def test_a_threshold_that_no_cosine_reaches_is_refused(threshold) -> None:
    with pytest.raises(ValueError, match=r"got (no )?threshold"):
        check_threshold(threshold, -1, 1)


def test_k_is_from_one_to_m() -> None:
    for fine in (None, 1, 2):
        check_top_k(fine, ["a", "b"])
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"got top_k {wrong}"):
            check_top_k(wrong, ["a", "b"])
