"""What the launcher says and what the configuration says is one, or one line before anything."""

from pathlib import Path

import pytest
from accelerate import DeepSpeedPlugin
from accelerate.commands import launch
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from expunge.errors import UserError
from expunge.train.accelerated import ACCUMULATION, accelerator_of, settle
from expunge.train.train_erase import train
from small_runs import small_run

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "accelerate"


@pytest.mark.parametrize("told", ["auto", "2"])
def test_a_launcher_that_accumulates_otherwise(told, tiny_sd1, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(ACCUMULATION, told)
    with pytest.raises(UserError, match=f"gradient_accumulation 3, and {told} from the launcher"):
        train(small_run(tiny_sd1, tmp_path / "out", gradient_accumulation=3))
    assert not (tmp_path / "out").exists()
    if told == "2":
        run = small_run(tiny_sd1, tmp_path / "out", gradient_accumulation=2)
        assert accelerator_of(run, tmp_path).gradient_accumulation_steps == 2


def test_the_shipped_configuration_leaves_deepspeed_to_the_training(tmp_path, monkeypatch) -> None:
    """Up to where DeepSpeed itself is needed, with what accelerate hands to the training."""
    started = []
    monkeypatch.setattr(launch, "deepspeed_launcher", started.append)
    argv = ["--config_file", str(CONFIGS / "deepspeed_zero2.yaml"), "train_erase.py"]
    launch.launch_command(launch.launch_command_parser().parse_args(argv))
    _, environment = prepare_deepspeed_cmd_env(*started)
    assert ACCUMULATION not in environment
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    settings = DeepSpeedPlugin().deepspeed_config
    settle(settings, small_run("x", tmp_path, gradient_accumulation=3, max_grad_norm=0.5))
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.5
    assert settings["train_micro_batch_size_per_gpu"] == 2
    settle(settings, small_run("x", tmp_path, max_grad_norm=float("inf")))
    assert settings["gradient_clipping"] == 0


def test_only_words_of_precision_blame_the_precision(tiny_sd1, tmp_path, monkeypatch) -> None:
    accelerator_of(small_run(tiny_sd1, tmp_path / "out", mixed_precision="bf16"), tmp_path)
    run = small_run(tiny_sd1, tmp_path / "out")
    with pytest.raises(UserError, match="got mixed_precision no"):  # it is another one already
        train(run)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no such compiler")
    with pytest.raises(ValueError, match="NO SUCH COMPILER") as caught:
        accelerator_of(run, tmp_path)
    assert "mixed_precision" not in str(caught.value)


def test_deepspeed_that_is_not_installed_is_one_line(tiny_sd1, tmp_path, monkeypatch) -> None:
    from accelerate.utils import is_deepspeed_available

    if is_deepspeed_available():
        pytest.skip("it is installed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed is not installed"):
        train(small_run(tiny_sd1, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
