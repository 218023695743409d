"""The loop on tiny real pipelines: it learns, repeats, resumes exactly, exports what it says."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge import adapters, backbones
from expunge.concepts import Concept
from expunge.configuration import load
from expunge.densities.clip_text import ClipText
from expunge.errors import UserError
from expunge.sampling.load import load_erased
from expunge.train.config import Lora, TrainConfig, Validation
from expunge.train.latents import Replay, Rollout
from expunge.train.noised import Noised
from expunge.train.objectives.ablation import Ablation
from expunge.train.objectives.density import Density
from expunge.train.objectives.esd import Esd
from expunge.train.objectives.hfi import Hfi
from expunge.train.objectives.sdd import Sdd
from expunge.train.objectives.slider import Slider
from expunge.train.objectives.spm import Spm
from expunge.train.objectives.uce import Uce
from expunge.train.preserve import Preserve
from expunge.train.robust import Robust
from expunge.train.several import Several
from expunge.train.sight import Gate
from expunge.train.train_erase import train

ROOT = Path(__file__).resolve().parents[2]


def config(model: str, folder: Path, **changes) -> TrainConfig:
    made = TrainConfig(
        output_dir=str(folder),
        model=model,
        concept=Concept(targets=["a bomb"], preserve=["", "a key", "a cat face", "a bus"]),
        objective=Esd(),
        latents=Rollout(steps=3, source="student"),
        preserve=Preserve(weight=1.0, batch_size=2, pairs=0.5),
        lora=Lora(rank=2, alpha=4.0),
        steps=4,
        batch_size=2,
        learning_rate=1e-2,
        checkpoint_every=0,
        validation=Validation(prompts=["a bomb"], seeds=1, steps=1),
    )
    return dataclasses.replace(made, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / adapters.FILE)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.fixture(autouse=True)
def _one_accelerator_at_a_time():
    """Accelerate keeps its state in a singleton; every run in one process starts afresh."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


ANCHORED = Concept(targets=["a bomb"], anchor="a balloon", preserve=["", "a key"])
OBJECTIVES = {
    "esd": {"objective": Esd()},
    "esd-x-strict": {"objective": Esd(variant="x-strict")},
    "esd-u": {"objective": Esd(variant="u")},
    "esd-all": {"objective": Esd(variant="all", erase_from="a weapon")},
    "ablation": {
        "objective": Ablation(),
        "latents": Noised(count=6, steps=2),
        "concept": ANCHORED,
    },
    "ablation-noise": {
        "objective": Ablation(target="noise", regularisation=1.0),
        "latents": Noised(count=5, steps=2),
        "concept": ANCHORED,
    },
    "slider": {
        "objective": Slider(subject="a weapon", attributes=["{} in ink style"]),
        "concept": ANCHORED,
    },
    "spm": {"objective": Spm()},
    "esd-replay": {
        "objective": Esd(),
        "latents": Replay(steps=3, source="student", rollouts=5, refresh=3),
        "preserve": Preserve(weight=1.0, batch_size=2),
        "concept": Concept(targets=["a bomb"], preserve=["a key", "a cat face"]),
    },
    "density": {
        "objective": Density(density=ClipText(threshold=-1.0), places=2),
        "latents": Replay(steps=3, source="student", rollouts=2, refresh=3),
    },
    "esd-gate": {
        "objective": Esd(),
        "gate": Gate(density=ClipText(threshold=-1.0)),
        "latents": Replay(steps=3, source="teacher", rollouts=5, refresh=3),
    },
    "esd-start": {"objective": Esd(), "start": Uce()},
    "esd-robust": {"objective": Esd(), "robust": Robust(restart=3)},
    "esd-several": {
        "objective": Esd(),
        "several": Several(order="balanced"),
        "concept": Concept(targets=["a bomb", "a skull"], preserve=["", "a key"]),
    },
    "hfi": {
        "objective": Hfi(ema_decay=0.9),
        "latents": Rollout(steps=3, source="ema", times="beta"),
    },
    "esd-together": {
        "objective": Esd(),
        "gate": Gate(density=ClipText(threshold=-1.0)),
        "several": Several(order="balanced"),
        "robust": Robust(restart=3),
        "latents": Replay(
            steps=3, source="teacher", rollouts=9, refresh=3, coreset=4, directions=2
        ),
        "preserve": Preserve(weight=1.0, batch_size=2),
        "concept": Concept(targets=["a bomb", "a skull"], preserve=["", "a key"]),
    },
    "esd-bf16": {"objective": Esd(), "mixed_precision": "bf16"},
    "sdd-bf16": {
        "objective": Sdd(ema_decay=0.9),
        "latents": Rollout(steps=3, source="ema"),
        "mixed_precision": "bf16",
    },
    "sdd": {
        "objective": Sdd(ema_decay=0.9),
        "latents": Rollout(steps=3, source="ema"),
        "concept": Concept(targets=["a bomb", "a dagger"], preserve=["", "a key"]),
    },
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sd2", "tiny_sdxl"])
def test_a_run_leaves_everything_it_promises(name, shape, request, tmp_path) -> None:
    model, out = request.getfixturevalue(shape), tmp_path / "out"
    run = config(model, out, checkpoint_every=2, **OBJECTIVES[name])
    file = train(run)
    assert file == out / adapters.FILE
    pipeline = load_erased(model, [str(out)])
    assert pipeline.get_active_adapters()
    result = json.loads((out / "train_result.json").read_text())
    assert result["objective"] == name.split("-")[0]
    assert result["base_sha256"]
    assert result["concept"]["targets"] == run.concept.targets
    assert result["steps"] == 4
    assert result["adapter_sha256"]
    assert result["seconds"] > 0
    assert result["peak_memory_bytes"] > 10**7
    forwards = result["unet_forwards"]
    networks = [need.split("/")[0] for need in run.objective.needs]
    # Of the density, which sees the concept everywhere, all that it is made of as well.
    passes = {"density": 3}.get(
        result["objective"], networks.count("teacher") + networks.count("student_sg")
    )
    assert forwards["student"] == 4 * (2 + 2 * networks.count("student")) * 3
    if isinstance(run.latents, Noised):
        # Two steps, a pair each, of two batches of four.
        assert forwards["sampling"] == 2 * 2 * 2 * 4
        assert forwards["teacher"] == 4 * (2 + 2 * passes)
    elif isinstance(run.latents, Replay):
        # Two banks in four steps, each of two batches of four or more, three steps, a pair each.
        batches = -(-run.latents.rollouts // 4)
        # For a coreset every retained one as it is, and along each direction.
        chosen = 2 * 3 * (1 + run.latents.directions) if run.latents.coreset else 0
        assert forwards["sampling"] == 2 * batches * (4 * 3 * 2 + chosen)
        # A latent that is met again, or was denoised by the teacher, is not asked about again.
        assert forwards["teacher"] < 4 * (2 + 2 * passes)
    else:
        assert forwards["teacher"] == 4 * (2 + 2 * passes)
        assert 4 * 2 * 4 <= forwards["sampling"] <= 4 * 2 * 2 * 4
    assert load(TrainConfig, out / "config.yaml") == run
    assert (out / "samples" / "step-000004.png").is_file()
    assert list((out / "logs").iterdir())
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000004",
    ]
    card = (out / "README.md").read_text()
    assert "concept-erasure" in card
    assert "a bomb" in card
    assert adapters.read_metadata(out)["concept"]["targets"] == run.concept.targets
    # Every layer learnt something: a lost gradient would leave its B at zero.
    assert all(v.any() for k, v in weights(out).items() if "lora_B" in k)


def test_every_objective_of_the_table_is_run() -> None:
    """But closed forms, which have no loop."""
    from expunge.train.objectives import OBJECTIVES as TABLE
    from expunge.train.objectives.base import ClosedForm

    table = {cls for cls in map(TABLE.load, TABLE) if not isinstance(cls(), ClosedForm)}
    assert {type(change["objective"]) for change in OBJECTIVES.values()} == table


def test_a_lora_of_another_family_is_refused(tiny_sd1, tiny_sdxl, tmp_path) -> None:
    for model, other in ((tiny_sdxl, tiny_sd1), (tiny_sd1, tiny_sdxl)):
        run = config(model, tmp_path / Path(model).name, steps=1, preserve=Preserve())
        train(run)
        with pytest.raises(UserError, match="does not fit this model"):
            load_erased(other, [run.output_dir])


def test_what_is_exported_is_the_average(tiny_sd1, tmp_path) -> None:
    run = config(tiny_sd1, tmp_path / "out", checkpoint_every=4, **OBJECTIVES["sdd"])
    train(run)
    state = tmp_path / "out" / "checkpoints" / "step-000004"
    student = load_file(state / "adapter.safetensors")
    averages = torch.load(state / "custom_checkpoint_2.pkl")["shadow_params"]
    exported = [v for v in weights(tmp_path / "out").values()]
    assert all(
        torch.equal(one, other)
        for one, other in zip(sorted_by_sum(exported), sorted_by_sum(averages), strict=True)
    )
    assert not any(
        torch.equal(v, student[k.removeprefix("unet.")])
        for k, v in weights(tmp_path / "out").items()
        if "lora_B" in k
    )


def sorted_by_sum(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return sorted(tensors, key=lambda tensor: (tensor.shape, tensor.double().sum().item()))


def test_a_kill_between_the_lora_and_its_result_is_finished_by_a_resume(tiny_sd1, tmp_path) -> None:
    run = config(tiny_sd1, tmp_path / "out", steps=2, checkpoint_every=1)
    train(run)
    before = (tmp_path / "out" / adapters.FILE).read_bytes()
    for name in ("train_result.json", "README.md"):
        (tmp_path / "out" / name).unlink()
    train(dataclasses.replace(run, resume=True))
    assert (tmp_path / "out" / "train_result.json").is_file()
    assert (tmp_path / "out" / "README.md").is_file()
    assert (tmp_path / "out" / adapters.FILE).read_bytes() == before


def test_a_configuration_that_was_kept_does_not_empty_its_folder(tiny_sd1, tmp_path) -> None:
    run = config(tiny_sd1, tmp_path / "out", steps=1)
    train(run)
    train(dataclasses.replace(run, overwrite=True))
    assert load(TrainConfig, tmp_path / "out" / "config.yaml").overwrite is False


def test_only_a_training_makes_way_for_a_training(tiny_sd1, tmp_path) -> None:
    from expunge.results import fresh_output_dir

    report = fresh_output_dir(tmp_path / "report") / "report.json"
    report.write_text("{}")
    for how in ("overwrite", "resume"):
        with pytest.raises(UserError, match="already holds results"):
            train(config(tiny_sd1, tmp_path / "report", **{how: True}))
    assert report.read_text() == "{}"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"latents": Rollout(source="ema")}, "keeps no average"),
        ({"preserve": Preserve(weight=1.0), "concept": Concept(targets=["a"])}, "preserve"),
        ({"objective": Ablation()}, "concept.anchor"),
        ({"objective": Ablation(regularisation=1.0), "concept": ANCHORED}, r"latents\.type noised"),
    ],
)
def test_settings_that_contradict_each_other(tiny_sd1, tmp_path, changes, match) -> None:
    with pytest.raises(ValueError, match=match):
        config(tiny_sd1, tmp_path / "out", **changes)


@pytest.mark.parametrize("bad", [{"every": -1}, {"seeds": 0}, {"steps": 0}])
def test_senseless_validation(bad) -> None:
    with pytest.raises(ValueError, match="Validation"):
        Validation(**bad)


def test_one_seed_one_adapter(tiny_sd1, tmp_path) -> None:
    train(config(tiny_sd1, tmp_path / "a"))
    random.seed(5)
    torch.manual_seed(99)
    train(config(tiny_sd1, tmp_path / "b"))
    train(config(tiny_sd1, tmp_path / "c", seed=1))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_it_learns_the_target(tiny_sd1, tmp_path) -> None:
    """The student under the concept approaches e0 − η (ep − e0)."""
    from expunge.train.objectives.esd import esd_target

    run = config(
        tiny_sd1,
        tmp_path / "out",
        steps=60,
        preserve=Preserve(),
        latents=Rollout(steps=2, source="teacher"),
        lora=Lora(rank=8, alpha=8.0),
    )
    train(run)
    erased, base = load_erased(tiny_sd1, [str(tmp_path / "out")]), backbones.load_pipeline(tiny_sd1)
    c, null = backbones.encode_prompts(base, ["a bomb", ""]).split(1)
    x, t = torch.randn(8, 4, 8, 8), torch.full((8,), 300)
    with torch.no_grad():
        ep, e0 = (base.unet(x, t, v.expand(8, -1, -1)).sample for v in (c, null))
        student = erased.unet(x, t, c.expand(8, -1, -1)).sample
    target = esd_target(e0, ep, 1.0)
    assert (student - target).square().mean() < 0.3 * (ep - target).square().mean()


def test_accumulation_takes_that_many_draws(tiny_sd1, tmp_path) -> None:
    train(config(tiny_sd1, tmp_path / "out", gradient_accumulation=3, steps=2))
    result = json.loads((tmp_path / "out" / "train_result.json").read_text())
    assert result["unet_forwards"]["student"] == 2 * 3 * 4 * 3


def test_neighbours_take_part(tiny_sd1, tmp_path) -> None:
    for folder, neighbours in (("all", 0), ("near", 1)):
        keep = Preserve(weight=1.0, batch_size=4, neighbours=neighbours)
        train(config(tiny_sd1, tmp_path / folder, steps=2, preserve=keep))
    assert not same(weights(tmp_path / "all"), weights(tmp_path / "near"))


def test_checkpointed_gradients_are_the_same_gradients(tiny_sd1, tmp_path) -> None:
    train(config(tiny_sd1, tmp_path / "a", steps=2))
    train(config(tiny_sd1, tmp_path / "b", steps=2, gradient_checkpointing=True))
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)


def test_a_diverging_run_ends_with_the_reason_and_no_adapter(tiny_sd1, tmp_path) -> None:
    with pytest.raises((FloatingPointError, RuntimeError), match=r"learning_rate|NaN"):
        train(config(tiny_sd1, tmp_path / "out", learning_rate=1e30, steps=20))
    assert not (tmp_path / "out" / adapters.FILE).exists()
    assert not (tmp_path / "out" / "train_result.json").exists()


SCRIPT = """
import sys
from expunge.cli import run
from expunge.train.train_erase import main
sys.exit(run(main, sys.argv[1:]))
"""


def launch(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    "kind",
    ["esd", "sdd", "esd-together", "ablation-noise"],
)
def test_killed_at_any_step_and_resumed_is_bit_identical(tiny_sd1, tmp_path, kind) -> None:
    from expunge.configuration import dump

    steps = 8
    reference = config(
        tiny_sd1, tmp_path / "whole", steps=steps, checkpoint_every=1, lr_scheduler="cosine",
        keep_checkpoints=steps, gradient_accumulation=2, **OBJECTIVES[kind],
    )  # fmt: skip
    yaml = tmp_path / "run.yaml"
    yaml.write_text(dump(reference))
    done = launch(["--config", str(yaml)])
    assert done.wait() == 0, done.stderr.read()
    out = tmp_path / "killed"
    arguments = ["--config", str(yaml), "--output_dir", str(out)]
    moments = random.Random(kind).sample(range(1, steps), 3)
    for step in sorted(moments):
        process = launch([*arguments, "--resume", "true"])
        # Killed right as, or shortly after, that step's state appears.
        while not (out / "checkpoints" / f"step-{step:06d}").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        time.sleep(random.Random(step).random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = launch([*arguments, "--resume", "true"])
    assert done.wait() == 0, done.stderr.read()
    assert same(weights(tmp_path / "whole"), weights(out))
    assert (tmp_path / "whole" / adapters.FILE).read_bytes() == (out / adapters.FILE).read_bytes()
    whole, killed = (
        json.loads((folder / "train_result.json").read_text())
        for folder in (tmp_path / "whole", out)
    )
    assert killed["unet_forwards"] == whole["unet_forwards"]
    again = launch([*arguments, "--resume", "true"])
    assert again.wait() == 0
    assert "nothing to resume" in again.stdout.read()


def test_resuming_another_run_is_refused(tiny_sd1, tmp_path) -> None:
    train(config(tiny_sd1, tmp_path / "out", steps=2, checkpoint_every=1))
    (tmp_path / "out" / "train_result.json").unlink()
    with pytest.raises(UserError, match="another learning_rate"):
        train(config(tiny_sd1, tmp_path / "out", steps=2, learning_rate=1.0, resume=True))


def test_resuming_on_other_weights_is_refused(tiny_sd1, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_sd1, base)
    run = config(str(base), tmp_path / "out", steps=2, checkpoint_every=1)
    train(run)
    (tmp_path / "out" / "train_result.json").unlink()
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v * 1.01 for k, v in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="not those the run began with"):
        train(dataclasses.replace(run, resume=True))


def test_a_torn_checkpoint_is_named(tiny_sd1, tmp_path) -> None:
    run = config(tiny_sd1, tmp_path / "out", steps=2, checkpoint_every=1)
    train(run)
    (tmp_path / "out" / "train_result.json").unlink()
    torn = tmp_path / "out" / "checkpoints" / "step-000002" / "adapter.safetensors"
    torn.write_bytes(torn.read_bytes()[:50])
    with pytest.raises(UserError, match=r"step-000002.*cannot be read"):
        train(dataclasses.replace(run, resume=True))


def test_earlier_results_are_never_written_over(tiny_sd1, tmp_path) -> None:
    run = config(tiny_sd1, tmp_path / "out", steps=1)
    train(run)
    before = (tmp_path / "out" / adapters.FILE).read_bytes()
    with pytest.raises(UserError, match="already holds results"):
        train(dataclasses.replace(run, seed=7))
    assert (tmp_path / "out" / adapters.FILE).read_bytes() == before
    train(dataclasses.replace(run, seed=7, overwrite=True))
    assert (tmp_path / "out" / adapters.FILE).read_bytes() != before


@pytest.mark.parametrize("how", ["gate", "density"])
def test_where_nothing_is_ever_seen_the_weights_stay(tiny_sd1, tmp_path, how) -> None:
    """Theorem: with η = ∞ the loss is zero at the start, and so is every step."""

    def run(η: float) -> TrainConfig:
        seen = ClipText(threshold=η)
        changes = {"gate": Gate(density=seen)} if how == "gate" else {"objective": Density(seen)}
        return config(
            tiny_sd1, tmp_path / str(η), preserve=Preserve(), steps=3, **changes
        )  # fmt: skip

    with pytest.raises(UserError, match="erases nothing"):
        train(run(1.0))
    train(run(-1.0))
    assert any(v.any() for k, v in weights(tmp_path / "-1.0").items() if "lora_B" in k)
