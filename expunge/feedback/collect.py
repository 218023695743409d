"""From pictures to labels: draw them, show them on the page, keep what is said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.errors import UserError
from expunge.feedback.labels import Labels, read_labels, to_label
from expunge.feedback.page import Page

if TYPE_CHECKING:
    from expunge.feedback.command import FeedbackConfig

LABELS = "labels.csv"
PICTURES = "pictures"


def collect(config: FeedbackConfig, folder: Path, pipeline: Any) -> Labels:
    """Show the page until it is done with; what was said is on disk after every press.

    Args:
        config: What is asked for.
        folder: For labels and pictures.
        pipeline: The model, which draws where there are no pictures.

    Raises:
        UserError: The pictures are missing, or the folder holds labels of others.
    """
    labels = _pictures(config, folder, pipeline)
    with Page(labels, f"Does this picture show it ({config.name})?") as page:
        print(f"open {page.address} and press y or n; Enter ends", flush=True)
        page.serve_forever(poll_interval=0.1)
    return labels


def _pictures(config: FeedbackConfig, folder: Path, pipeline: Any) -> Labels:
    """What the page shows: the pictures of a CSV, of a folder, or drawn for it."""
    if config.labels is not None:
        if Path(config.labels).is_dir():
            raise UserError(
                f"got labels {config.labels}, a folder, and page; allowed: a CSV, which the page "
                "fills in; or images FOLDER"
            )
        labels = read_labels(Path(config.labels))
        if labels.others:
            raise UserError(
                f"got labels {config.labels} with a column {labels.others[0]}, which would be "
                "lost; allowed: file, label and prompt; remove the others, or label a copy"
            )
        return labels
    if config.images is not None:
        from expunge.pictures import picture_files

        files = picture_files(config.images)
        return to_label(folder / LABELS, files, [""] * len(files))
    jobs = [(p, config.seed + i) for p in config.prompt for i in range(config.images_per_prompt)]
    files = [folder / PICTURES / f"{i:04d}-seed-{seed}.png" for i, (_, seed) in enumerate(jobs)]
    labels = to_label(folder / LABELS, files, [prompt for prompt, _ in jobs])
    if not (folder / LABELS).exists():
        (folder / PICTURES).mkdir(exist_ok=True)
        _draw(config, pipeline, files, jobs)
        labels.save()
    return labels


def _draw(
    config: FeedbackConfig, pipeline: Any, files: list[Path], jobs: list[tuple[str, int]]
) -> None:
    from tqdm import tqdm

    from expunge import backbones
    from expunge.generation import generate
    from expunge.pictures import save_png, to_pil

    with tqdm(total=len(jobs), desc="draw", unit="image", disable=None) as bar:
        for start in range(0, len(jobs), 8):
            part = jobs[start : start + 8]
            pictures = generate(
                pipeline, [p for p, _ in part], [seed for _, seed in part],
                steps=config.sampling_steps,
                guidance_scale=backbones.recommended_guidance(config.model),
            )  # fmt: skip
            for file, picture in zip(files[start:], pictures, strict=False):
                save_png(to_pil(picture), file)
            bar.update(len(part))
