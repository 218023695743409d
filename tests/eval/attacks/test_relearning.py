"""Relearning that is killed goes on to the same end."""

from typing import Any

import pytest
import torch

from expunge.eval.attacks import runner
from expunge.eval.attacks.learnt import FILE, Learnt
from expunge.eval.attacks.relearning import Relearning
from expunge.eval.attacks.runner import attack_all

# It never comes back, and so is looked at three times.
HOW = Relearning(pictures=2, checkpoints=[2, 3, 5], learning_rate=1e-6, batch_size=2, share=1.0)


def learnt(field: Any) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in field.erased.unet.named_parameters() if "attn2" in name}


def timeless(done: dict[str, Any]) -> tuple[Any, ...]:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in done["rows"]]
    return rows, done["common"]["passes"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(
    arena: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    def field_of(**settings: Any) -> Any:
        field = arena(**settings)
        field.erased.to(dtype)
        return field

    whole = field_of()
    done = attack_all(HOW, whole, at_once=8)
    assert [t["said"] for t in done["rows"][0]["trials"]] == ["step 2", "step 3", "step 5"]
    assert not (whole.folder / FILE).exists()

    steps: list[int] = []
    real = torch.optim.AdamW.step
    looks: list[int] = []
    look = type(whole).attempt

    def step(self: Any, *args: Any) -> Any:
        if len(steps) == stop_at[0]:
            raise KeyboardInterrupt
        steps.append(1)
        return real(self, *args)

    def attempt(self: Any, trials: Any) -> Any:
        if len(looks) == stop_at[1]:
            raise KeyboardInterrupt
        looks.append(1)
        return look(self, trials)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(type(whole), "attempt", attempt)
    folder = field_of().folder
    # Before the first look; in the second training; at the third look; and to the end.
    for stop_at, made in (((1, 9), 1), ((2, 9), 2), ((9, 1), 3), ((9, 9), 2)):
        steps.clear()
        looks.clear()
        field = field_of(folder=folder)
        if stop_at == (9, 9):
            again = attack_all(HOW, field, at_once=8)
        else:
            with pytest.raises(KeyboardInterrupt):
                attack_all(HOW, field, at_once=8)
        assert len(steps) == made
    assert timeless(again) == timeless(done)
    for name, weight in learnt(whole).items():
        assert torch.equal(weight, learnt(field)[name]), name
    assert not list(folder.glob("*.pt"))


def test_killed_before_its_end_is_written_down_it_does_not_begin_anew(
    arena: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    field = arena()
    with monkeypatch.context() as patched:
        patched.setattr(runner, "append", full)
        with pytest.raises(OSError, match="No space"):
            attack_all(HOW, field, at_once=8)
    steps: list[int] = []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a: steps.append(1) or real(*a))
    again = arena(folder=field.folder)
    done = attack_all(HOW, again, at_once=8)
    assert [t["said"] for t in done["rows"][0]["trials"]] == ["step 2", "step 3", "step 5"]
    assert steps == []
    assert not list(field.folder.glob("*.pt"))


def test_the_time_before_a_kill_counts(arena: Any) -> None:
    field = arena(n=1)
    weight = torch.nn.Parameter(torch.ones(3))
    adam, draw = torch.optim.AdamW([weight]), torch.Generator()
    first = Learnt(field, [weight], adam, draw)
    first._begun -= 100.0
    first.keep(1)
    other = arena(n=1, folder=field.folder)
    again = Learnt(other, [weight], adam, draw)
    assert again.restore() == 1
    assert 100 <= other.seconds < 200
    again.keep(2)
    assert Learnt(other, [weight], adam, draw).restore() == 2
    assert 100 <= other.seconds < 200
