"""Sheets of pictures: base above student at the same seeds, on the disk and in tensorboard."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from expunge import backbones, pictures
from expunge.generation import generate
from expunge.sampling.load import load_erased
from expunge.train.config import TrainConfig, Validation
from expunge.train.objectives.uce import Uce
from expunge.train.preserve import Preserve
from expunge.train.train_erase import train
from small_runs import KINDS, small_run

PROMPTS = ["a bomb", "a key"]
CHOICE = Validation(every=2, prompts=PROMPTS, seeds=2, steps=2, guidance_scale=3.0)


def sheet(run: TrainConfig) -> Image.Image:
    """What belongs on the last sheet of a run, from the base itself and from its LoRA."""
    choice, drawn = run.validation, []
    models = backbones.load_pipeline(run.model), load_erased(run.model, [run.output_dir])
    for prompt in choice.prompts:
        for model in models:
            images = generate(
                model, [prompt] * choice.seeds, range(choice.seeds),
                steps=choice.steps, guidance_scale=3.0,
            )  # fmt: skip
            drawn.append([pictures.to_pil(image) for image in images])
    assert all(np.any(a != b) for a, b in zip(drawn[::2], drawn[1::2], strict=True))
    labels = [f"{when}: {p}" for p in choice.prompts for when in ("before", "after")]
    return pictures.sheet(drawn, labels)


def logged(folder: Path) -> dict[int, Image.Image]:
    """Step -> what tensorboard shows of it."""
    events = EventAccumulator(str(folder / "logs"), {"images": 0}).Reload()
    return {
        event.step: Image.open(io.BytesIO(event.encoded_image_string))
        for event in events.Images("samples")
    }


@pytest.mark.parametrize("kind", ["esd", "sdd"])
def test_what_was_and_what_is_left_are_above_each_other(tiny_sd1, tmp_path, kind) -> None:
    run = small_run(tiny_sd1, tmp_path / "out", validation=CHOICE, **KINDS[kind])
    train(run)
    shown = logged(tmp_path / "out")
    assert sorted(shown) == [2, 4]
    for step, image in shown.items():
        file = tmp_path / "out" / "samples" / f"step-{step:06d}.png"
        assert np.array_equal(image, Image.open(file))
    assert np.array_equal(shown[4], sheet(run))
    # Of each pair the upper half stays, and the lower one changes with the training.
    parts = [np.split(np.asarray(image)[: -pictures.GAP], 4) for image in (shown[2], shown[4])]
    assert [np.array_equal(a, b) for a, b in zip(*parts, strict=True)] == [True, False] * 2


def test_a_closed_form_shows_both_too(tiny_sd1, tmp_path) -> None:
    run = small_run(
        tiny_sd1, tmp_path / "out", objective=Uce(), preserve=Preserve(), validation=CHOICE
    )
    train(run)
    assert np.array_equal(Image.open(tmp_path / "out/samples/step-000000.png"), sheet(run))


def test_a_resumed_run_shows_what_it_is_asked_for_now(tiny_sd1, tmp_path) -> None:
    run = small_run(tiny_sd1, tmp_path / "out", checkpoint_every=2, validation=CHOICE)
    train(run)
    (tmp_path / "out" / "train_result.json").unlink()
    last = tmp_path / "out" / "samples" / "step-000004.png"
    last.unlink()
    more = dataclasses.replace(CHOICE, prompts=[*PROMPTS, "a bus"], seeds=3)
    run = dataclasses.replace(run, resume=True, validation=more)
    train(run)
    assert np.array_equal(Image.open(last), sheet(run))
