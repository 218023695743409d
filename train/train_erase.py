"""`expunge train` and `accelerate launch train_erase.py`: erase a concept, export the LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expunge.train.config import TrainConfig
    from expunge.train.loop import Trainer

RESULT = "train_result.json"
# What may change between a run and its resumption without making it another run.
FREE = ("resume", "overwrite", "output_dir", "checkpoint_every", "keep_checkpoints", "validation")


def main(argv: list[str]) -> None:
    """Train from a configuration; see `expunge train --help`."""
    from expunge.configuration import parse
    from expunge.train.config import TrainConfig

    config = parse(TrainConfig, argv, "expunge train")
    train(config)


def train(config: TrainConfig) -> Path:
    """Erase `config.concept` and leave LoRA, result, model card and pictures in `output_dir`.

    Returns:
        The LoRA file, which was loaded back and compared.

    Raises:
        UserError: The model, the folder or the configuration is wrong; nothing was written.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    from expunge import adapters, backbones
    from expunge.configuration import dump
    from expunge.errors import UserError
    from expunge.results import fresh_output_dir, sha256_folder, write_text_atomic

    folder = Path(config.output_dir)
    fresh_output_dir(folder, config.overwrite, config.resume, dry_run=True)
    _refuse_foreign_results(config, folder)
    _refuse_another_run(config, folder)
    if config.resume and (folder / RESULT).is_file():  # it is written last
        print(f"{folder} is complete; nothing to resume")
        return folder / adapters.FILE
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation,
            mixed_precision=config.mixed_precision,
            log_with="tensorboard",
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder)),
        )
    except ValueError as error:
        raise UserError(
            f"got mixed_precision {config.mixed_precision} ({error}); allowed on this machine: no, "
            "and bf16 where its processor has it"
        ) from error
    pipeline = backbones.load_pipeline(config.model, device=str(accelerator.device))
    from expunge.train.loop import Trainer

    where = Path(backbones.resolve(config.model))
    base = sha256_folder(where) if where.is_dir() else None
    trainer = Trainer(config, pipeline, accelerator, folder, base)
    if accelerator.is_main_process:
        fresh_output_dir(folder, config.overwrite, config.resume)
        # The file is for repeating the run, which must not empty this folder.
        again = replace(config, overwrite=False, resume=False)
        write_text_atomic(folder / "config.yaml", dump(again))
    accelerator.wait_for_everyone()
    accelerator.init_trackers("logs")
    trainer.run(lambda step: _validate(trainer, folder, step))
    _validate(trainer, folder, config.steps)
    if accelerator.is_main_process:
        with trainer.networks.averaged():
            _finish(trainer, folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder / adapters.FILE


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
    then, now = yaml.safe_load(earlier.read_text()), yaml.safe_load(dump(config))
    changed = [k for k in now if k not in FREE and now[k] != (then or {}).get(k)]
    if changed:
        raise UserError(
            f"got another {', '.join(changed)} than the run in {folder}; allowed: to resume the "
            "same run; choose another output_dir or say --overwrite true"
        )


def _finish(trainer: Trainer, folder: Path) -> None:
    import yaml

    from expunge import adapters
    from expunge.configuration import dump
    from expunge.results import (
        provenance,
        sha256_file,
        write_json_atomic,
        write_text_atomic,
    )
    from expunge.train.card import model_card
    from expunge.train.loop import peak_memory_bytes
    from expunge.train.objectives import OBJECTIVES

    config, progress = trainer.config, trainer.progress
    concept = yaml.safe_load(dump(config))["concept"]
    about: dict[str, Any] = {
        "objective": OBJECTIVES.name_of(type(config.objective)),
        "concept": concept,
        "model": config.model,
        "base_sha256": progress.base,
        "seed": config.seed,
        "steps": config.steps,
    }
    file = adapters.save(trainer.pipeline, folder, about)
    result = about | {
        "schema_version": 1,
        "seconds": round(progress.seconds, 3),
        "unet_forwards": progress.forwards,
        "trainable_parameters": sum(p.numel() for p in trainer.parameters),
        "peak_memory_bytes": peak_memory_bytes(),
        "adapter_sha256": sha256_file(file),
        "provenance": provenance(),
    }
    write_text_atomic(folder / "README.md", model_card(config, result))
    write_json_atomic(folder / RESULT, result)
    print(f"erased {config.concept.name!r}; the LoRA was read back and is {file}")


def _validate(trainer: Trainer, folder: Path, step: int) -> None:
    """A sheet of pictures of the student, as it would be exported now, and in tensorboard."""
    if not trainer.accelerator.is_main_process:
        return
    import numpy as np

    from expunge import backbones, pictures
    from expunge.generation import generate

    config = trainer.config
    choice, concept = config.validation, config.concept
    prompts = choice.prompts or [*concept.prompts()[:3], *concept.retained()[:3]]
    guidance = choice.guidance_scale
    if guidance is None:
        guidance = backbones.recommended_guidance(config.model)
    with trainer.networks.averaged():
        images = generate(
            trainer.pipeline,
            [prompt for prompt in prompts for _ in range(choice.seeds)],
            list(range(choice.seeds)) * len(prompts),
            steps=choice.steps,
            guidance_scale=guidance,
        )
    rows = [[pictures.to_pil(image) for image in part] for part in images.split(choice.seeds)]
    sheet = pictures.sheet(rows, prompts)
    (folder / "samples").mkdir(exist_ok=True)
    pictures.save_png(sheet, folder / "samples" / f"step-{step:06d}.png")
    for tracker in trainer.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
