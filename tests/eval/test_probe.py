"""A training that is looked at, and ends when the concept is gone and the rest is there."""

import json
from pathlib import Path

import pytest
import yaml

from expunge import backbones
from expunge.concepts import Concept
from expunge.errors import UserError
from expunge.eval.probe import Probe
from expunge.train.config import Lora, TrainConfig, Validation
from expunge.train.latents import Rollout
from expunge.train.objectives.esd import Esd
from expunge.train.objectives.uce import Uce
from expunge.train.train_erase import train


@pytest.fixture(scope="module")
def watch():
    return Probe(limit=2, stop=True).open(backbones.load_pipeline("emoji"), ["a bomb"])


def test_the_base_shows_the_concept_and_the_rest(watch) -> None:
    assert watch.base["target_seen"] == 1
    assert min(watch.base[name] for name in watch.base if "kept" in name) >= 0.5
    assert not watch.good(watch.base)


def test_it_is_satisfied_by_what_is_erased_and_kept(watch) -> None:
    gone = {name: 0.0 if name.endswith("seen") else rate for name, rate in watch.base.items()}
    assert watch.satisfied(gone)
    assert not watch.satisfied(gone | {"target_seen": 0.06})
    assert not watch.satisfied(gone | {"kept_style": 0.94 * watch.base["kept_style"]})


def test_what_cannot_be_judged_is_neither_gone_nor_kept(watch, monkeypatch) -> None:
    def crash(images):
        raise RuntimeError("no eyes")

    monkeypatch.setattr(watch.detector, "observe", crash)
    rates = watch()
    assert rates["target_seen"] == 1
    assert rates["kept_style"] == 0


def run(folder: Path, **changes) -> dict:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {
        "output_dir": str(folder), "concept": Concept(targets=["a bomb"], anchor="a balloon"),
        "objective": Esd(), "latents": Rollout(steps=2), "steps": 3,
        "start": Uce(tokens="rest", regularisation=0.01),
        "lora": Lora(rank=32, alpha=32.0), "learning_rate": 1e-6, "checkpoint_every": 0,
        "validation": Validation(prompts=["a bomb"], seeds=1, steps=1),
    }  # fmt: skip
    train(TrainConfig(**settings | changes))
    return json.loads((folder / "train_result.json").read_text())


def test_a_training_ends_when_the_probe_is_satisfied(tmp_path) -> None:
    """UCE alone has erased it before the first step; without it, it takes one look."""
    lenient = {"every": 1, "limit": 1, "kept": 0.01, "erased": 0.99}
    done = run(tmp_path / "stop", probe=Probe(stop=True, **lenient))
    assert done["steps"] == 0
    assert sum(done["unet_forwards"].values()) == 0
    found = run(tmp_path / "look", probe=Probe(**lenient | {"every": 2}))
    assert found["steps"] == 3
    assert list(found["probes"]) == ["0", "2"]
    assert found["probes"]["2"]["target_seen"] in (0, 1)
    assert 0 < found["probes"]["2"]["unet_forwards"] < sum(found["unet_forwards"].values())
    assert all(look["good"] is True for look in found["probes"].values())
    plain = run(tmp_path / "plain", start=None, probe=Probe(every=2, limit=1))
    assert [look["good"] for look in plain["probes"].values()] == [False]


def test_a_concept_that_the_suite_does_not_know_is_refused_before_anything(tmp_path) -> None:
    with pytest.raises(UserError, match="a zeppelin"):
        run(tmp_path / "out", concept=Concept(targets=["a zeppelin"]), probe=Probe())
    assert not (tmp_path / "out").exists()


def test_a_suite_that_never_asks_whether_it_is_gone_is_refused(tmp_path) -> None:
    """Of nothing all is true: such a training would end at its first look, and say erased."""
    import expunge.eval.suites

    shipped = Path(str(expunge.eval.suites.__path__[0])) / "emoji.yaml"
    table = yaml.safe_load(shipped.read_text())
    groups = table["prompts"]
    for name in ("target", "pair"):
        groups.pop(name), table["groups"].pop(name)
    (tmp_path / "kept.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(UserError, match="does not ask whether the concept is gone"):
        Probe(suite=str(tmp_path / "kept.yaml")).open(backbones.load_pipeline("emoji"), ["a bomb"])


@pytest.mark.parametrize("bad", [{"every": 0}, {"limit": 0}, {"erased": 1.0}, {"kept": 0.0}])
def test_a_senseless_probe(bad) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Probe(**bad)
