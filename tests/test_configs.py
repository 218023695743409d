"""Every shipped configuration loads, says what it costs, and is launched as its header says."""

import re
from pathlib import Path

import pytest

from expunge.configuration import dump, load, parse, shipped
from expunge.errors import UserError
from expunge.train.config import TrainConfig
from expunge.train.objectives import OBJECTIVES

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TRAIN = sorted((CONFIGS / "train").glob("*.yaml"))
ACCELERATE = sorted((CONFIGS / "accelerate").glob("*.yaml"))


def test_there_are_some_and_they_are_listed() -> None:
    assert {f"train/{file.name}" for file in TRAIN} <= set(shipped())
    assert len(TRAIN) >= 4
    assert all(shipped().values())


@pytest.mark.parametrize("file", TRAIN, ids=lambda file: file.name)
def test_a_training_configuration(file, tmp_path) -> None:
    header = file.read_text().split("\nmodel:")[0]
    assert "Cost:" in header
    launch = re.search(r"Launch: accelerate launch train_erase.py --config (\S+) ", header)
    assert launch is not None
    assert launch[1] == f"configs/train/{file.name}"
    config = parse(TrainConfig, ["--config", f"train/{file.name}", "--output_dir", "x"])
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(TrainConfig, tmp_path / "again.yaml") == config


def test_every_objective_but_ours_is_there_as_published() -> None:
    """Its own section says what was published, and it runs without preservation."""
    found = {}
    for file in TRAIN:
        if file.stem.endswith("_published"):
            config = parse(TrainConfig, ["--config", f"train/{file.name}", "--output_dir", "x"])
            assert not config.preserve.weight
            found[OBJECTIVES.name_of(type(config.objective))] = file.stem
    assert found == {
        name: f"emoji_bomb_{name}_published" for name in {*OBJECTIVES.names()} - {"density", "twin"}
    }


@pytest.mark.parametrize("name", ["emoji_bomb_esd", "emoji_bomb_sdd"])
def test_the_emoji_configurations_preserve_all_but_the_target(name) -> None:
    from expunge.eval.emoji_vocabulary import Vocabulary

    phrases = set(Vocabulary.read(None).phrases.values())
    arguments = ["--config", f"train/{name}.yaml", "--output_dir", "x"]
    config = parse(TrainConfig, arguments)
    assert set(config.concept.retained()) == phrases - {"a bomb"} | {""}
    # Another target from the command line takes the first one's place.
    config = parse(TrainConfig, [*arguments, "--concept.targets", '["a cigarette"]'])
    assert set(config.concept.retained()) == phrases - {"a cigarette"} | {""}


@pytest.mark.parametrize("file", ACCELERATE, ids=lambda file: file.name)
def test_a_configuration_of_the_launcher(file) -> None:
    """Accelerate itself reads it, and nobody takes it for a training."""
    from accelerate.commands.config.config_args import load_config_from_file

    header = file.read_text().split("\ncompute_environment:")[0]
    assert f"Launch: accelerate launch --config_file configs/accelerate/{file.name} " in header
    found = load_config_from_file(str(file))
    assert found.num_processes == 2
    assert found.num_machines == 1
    expected = {"two_cpu": "MULTI_CPU", "multi_gpu": "MULTI_GPU", "deepspeed_zero2": "DEEPSPEED"}
    assert found.distributed_type.value == expected[file.stem]
    assert not any(name.startswith("accelerate/") for name in shipped())
    with pytest.raises(UserError, match="configuration file"):
        parse(TrainConfig, ["--config", f"accelerate/{file.name}", "--output_dir", "x"])
