"""`expunge train` and `accelerate launch train_erase.py`: erase a concept, export the LoRA."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expunge.train.config import TrainConfig
    from expunge.train.loop import Progress, Trainer
    from expunge.train.samples import Samples

RESULT = "train_result.json"
EDIT = "edit.safetensors"  # of a closed form: the exact change; the LoRA has what its rank can hold
# What may change between a run and its resumption without making it another run.
FREE = ("resume", "overwrite", "output_dir", "checkpoint_every", "keep_checkpoints", "validation")


def main(argv: list[str]) -> int:
    """Train from a configuration; see `expunge train --help`."""
    from expunge.train import launch

    launch.follow()  # before anything that takes long to import
    from expunge.configuration import parse
    from expunge.train.config import TrainConfig

    config = parse(TrainConfig, argv, "expunge train")
    if (processes := launch.wanted()) > 1:
        return launch.start(processes)
    train(config)
    return 0


def train(config: TrainConfig) -> Path:
    """Erase `config.concept` and leave LoRA, result, model card and pictures in `output_dir`.

    Returns:
        The LoRA file, which was loaded back and compared.

    Raises:
        UserError: The model, the folder or the configuration is wrong; nothing was written.
    """
    from expunge import adapters
    from expunge.results import fresh_output_dir
    from expunge.train import footprint
    from expunge.train.accelerated import accelerator_of
    from expunge.train.launch import together

    folder = Path(config.output_dir)
    fresh_output_dir(folder, config.overwrite, config.resume, dry_run=True)
    _refuse_foreign_results(config, folder)
    _refuse_another_run(config, folder)
    if config.resume and (folder / RESULT).is_file():  # it is written last
        print(f"{folder} is complete; nothing to resume")
        return folder / adapters.FILE
    accelerator = accelerator_of(config, folder)
    footprint.refuse(config, accelerator.device, accelerator.distributed_type.value)
    with together(accelerator.num_processes):
        _erase(config, accelerator, folder)
    accelerator.end_training()
    return folder / adapters.FILE


def _erase(config: TrainConfig, accelerator: Any, folder: Path) -> None:
    from expunge import backbones, soft_tokens
    from expunge.configuration import dump
    from expunge.errors import UserError
    from expunge.results import fresh_output_dir, write_json_atomic, write_text_atomic
    from expunge.train import footprint
    from expunge.train.closed_form.solve import solve
    from expunge.train.loop import Progress, Trainer
    from expunge.train.objectives.base import ClosedForm
    from expunge.train.samples import Samples

    pipeline = footprint.load(config, accelerator.device)
    tokens = soft_tokens.load(pipeline, config.concept.tokens)
    texts = [*config.concept.texts(), *config.validation.prompts, *config.preserve.templates]
    soft_tokens.require(pipeline, [*texts, *_strings(asdict(config.objective))])
    # What is cut off at its end may have lost the concept, and would be erased without it.
    soft_tokens.fits(pipeline, [*config.concept.prompts(), *config.concept.preserve])
    base = backbones.identity(config.model)
    samples = Samples(config, pipeline, folder)

    def begin() -> None:
        fresh_output_dir(folder, config.overwrite, config.resume)
        # The file is for repeating the run, which must not empty this folder.
        again = replace(config, overwrite=False, resume=False)
        write_text_atomic(folder / "config.yaml", dump(again))

    if isinstance(config.objective, ClosedForm):
        if accelerator.is_main_process:
            progress = Progress(base=base, tokens=tokens)
            edit = solve(config, pipeline, progress)
            begin()
            edit.save(folder / EDIT)
            result = _export(config, pipeline, progress, folder, accelerator.device)
            samples.draw(0)
            write_json_atomic(folder / RESULT, result)
        accelerator.wait_for_everyone()
        return
    probe = config.probe.open(pipeline, config.concept.targets) if config.probe else None
    trainer = Trainer(config, pipeline, accelerator, folder, base, probe, tokens)
    if config.resume:
        trainer.resume()
    if accelerator.is_main_process:
        begin()
    accelerator.wait_for_everyone()
    accelerator.init_trackers("logs")
    trainer.run(lambda step: _validate(trainer, samples, step))
    sights = trainer.progress.sights
    if sights["looked"] and not sights["seen"]:
        raise UserError(
            f"got a density that saw the concept in none of {sights['looked']} pictures, so that "
            "it erased nothing; allowed: one that sees it; lower its threshold, or name the "
            "concept in other words"
        )
    if accelerator.is_main_process:
        with trainer.networks.averaged():
            result = _export(config, pipeline, trainer.progress, folder, accelerator.device)
    accelerator.wait_for_everyone()
    # After the LoRA: on a small GPU pictures may need more than the training did.
    _validate(trainer, samples, trainer.progress.step)
    if accelerator.is_main_process:
        write_json_atomic(folder / RESULT, result)


def _strings(value: Any) -> list[str]:
    """Every text in plain values."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [s for part in parts for s in _strings(part)] if isinstance(value, dict | list) else []


def _refuse_foreign_results(config: TrainConfig, folder: Path) -> None:
    """An evaluation's folder carries expunge's marker too; only a training makes way for one."""
    from expunge.results import fresh_output_dir

    if (config.overwrite or config.resume) and not (folder / "config.yaml").is_file():
        fresh_output_dir(folder, dry_run=True)


def _refuse_another_run(config: TrainConfig, folder: Path) -> None:
    import yaml

    from expunge.configuration import dump
    from expunge.errors import UserError

    earlier = folder / "config.yaml"
    if not (config.resume and earlier.is_file()):
        return
    try:
        then = yaml.safe_load(earlier.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        then = None
    if not isinstance(then, dict):
        raise UserError(
            f"got {earlier}, which no training wrote; allowed: the folder of a run; choose another "
            "output_dir"
        )
    now = yaml.safe_load(dump(config))
    for run in (then, now):
        # On other numbers of processes these differ; the checkpoint tells whether all may.
        run.pop("batch_size", None)
        run.get("preserve", {}).pop("batch_size", None)
    changed = [k for k in now if k not in FREE and now[k] != then.get(k)]
    if changed:
        raise UserError(
            f"got another {', '.join(changed)} than the run in {folder}; allowed: to resume the "
            "same run; choose another output_dir or say --overwrite true"
        )


def _export(
    config: TrainConfig,
    pipeline: Any,
    progress: Progress,
    folder: Path,
    device: Any,
) -> dict[str, Any]:
    """Write LoRA and card; what is returned is for `RESULT`, which says that all is there."""
    from expunge import adapters, backbones
    from expunge.results import provenance, sha256_file, sha256_folder, write_text_atomic
    from expunge.train.card import model_card
    from expunge.train.loop import peak_memory_bytes
    from expunge.train.objectives import OBJECTIVES

    # A path says nothing to whoever gets the LoRA; the content does.
    concept = config.concept.in_words() | {"tokens": progress.tokens}
    if config.concept.images:
        concept["images"] = sha256_folder(config.concept.images)
    of_hub = not Path(backbones.resolve(config.model)).is_dir()
    about: dict[str, Any] = {
        "objective": OBJECTIVES.name_of(type(config.objective)),
        "concept": concept,
        "model": config.model,
        "base_sha256": None if of_hub else progress.base,
        "seed": config.seed,
        "steps": progress.step,
    }
    if progress.clips:
        about["clips"] = progress.clips
    if progress.svd_error is not None:
        about["svd_error"] = progress.svd_error
    file = adapters.save(pipeline, folder, about)
    result = about | {
        "schema_version": 1,
        "base_commit": progress.base if of_hub else None,
        "seconds": round(progress.seconds, 3),
        "unet_forwards": progress.forwards,
        "probes": progress.probes,
        "stopped": progress.stopped,
        "sights": progress.sights,
        "batch": progress.batch[0],
        "trainable_parameters": sum(
            p.numel() for p in pipeline.unet.parameters() if p.requires_grad
        ),
        "peak_memory_bytes": peak_memory_bytes(device),
        "adapter_sha256": sha256_file(file),
        "provenance": provenance(),
    }
    write_text_atomic(folder / "README.md", model_card(config, result))
    print(f"erased {config.concept.name!r}; the LoRA was read back and is {file}")
    if (progress.svd_error or 0) > 0.1:
        print(
            f"rank {config.lora.rank} lacks {progress.svd_error:.0%} of the closed form's edit; "
            "raise lora.rank"
        )
    return result


def _validate(trainer: Trainer, samples: Samples, step: int) -> None:
    """A sheet of what would be exported now, below what was there before; and in tensorboard."""
    if not trainer.accelerator.is_main_process:
        return
    import numpy as np

    with trainer.networks.averaged(), trainer.pictures():
        sheet = samples.draw(step)
    for tracker in trainer.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
            tracker.writer.flush()  # what a kill leaves in a folder is in its logs too
