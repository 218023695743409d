"""`expunge feedback`: yes and no about pictures into a soft token that can be erased."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expunge.configuration import parse
from expunge.errors import UserError
from expunge.feedback.collect import LABELS, PICTURES, collect
from expunge.feedback.labels import NO, OPEN, YES, Labels, read_labels
from expunge.inversion import Inversion

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.densities.clip_head import Head
    from expunge.densities.head_training import HeadReport

TOKENS = "tokens.safetensors"
REWARD = "reward.safetensors"
SAMPLES = "samples.png"
TRAIN = "train.yaml"
RESULT = "feedback.json"
DERIVED = (RESULT, TRAIN, SAMPLES, TOKENS, REWARD)
DRAWN = 16  # pictures that show what the token draws
_WHAT = (
    "labels (a folder sorted into yes and no, or a CSV), or page true with pictures to be labelled "
    "(images or prompt)"
)


@dataclass(frozen=True)
class FeedbackConfig:
    """What `expunge feedback` is told."""

    output_dir: str = field(metadata={"help": "folder for tokens, head, report, configuration"})
    labels: str | None = field(
        default=None,
        metadata={"help": "a folder with yes/ and no/, or a CSV with the columns file and label"},
    )
    page: bool = field(
        default=False, metadata={"help": "label in the browser, on this machine, by key"}
    )
    images: str | None = field(
        default=None, metadata={"help": "a folder of pictures to be labelled on the page; or:"}
    )
    prompt: list[str] = field(
        default_factory=list,
        metadata={"help": "what the model draws for the page; may be repeated", "repeat": True},
    )
    images_per_prompt: int = field(default=4, metadata={"help": "seeds seed, seed + 1, …"})
    sampling_steps: int = field(default=25, metadata={"help": "denoising steps of a picture"})
    name: str = field(
        default="concept", metadata={"help": "what the concept is called; its token is <name>"}
    )
    model: str = field(default="emoji", metadata={"help": "emoji, a diffusers folder, a hub id"})
    clip: str = field(
        default="emoji", metadata={"help": "the CLIP below the reward: emoji, a folder, a name"}
    )
    inversion: Inversion = field(default_factory=Inversion)
    preserve: list[str] = field(
        default_factory=list,
        metadata={
            "help": "a prompt that stays, for train.yaml; may be repeated; those of which every "
            "picture was labelled no are added",
            "repeat": True,
        },
    )
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    overwrite: bool = field(
        default=False, metadata={"help": "replace earlier results; labels and pictures stay"}
    )

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise ValueError(f"got images_per_prompt {self.images_per_prompt}; allowed: 1 or more")
        if not 1 <= self.sampling_steps <= 1000:  # as many as a model was trained with
            raise ValueError(f"got sampling_steps {self.sampling_steps}; allowed: 1 to 1000")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"got seed {self.seed}; allowed: 0 to 2⁶³ − 1")
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", self.name):
            raise ValueError(
                f"got name {self.name!r}; allowed: small letters, digits and -, as in bad-thing"
            )
        pictures = bool(self.prompt) + (self.images is not None)
        if pictures + (self.labels is not None) != 1 or bool(pictures) > self.page:
            raise ValueError(f"got neither or both of labels and pictures; allowed: {_WHAT}")

    @property
    def token(self) -> str:
        """The word of the concept."""
        return f"<{self.name}>"


def main(argv: list[str]) -> None:
    """Collect labels, learn the reward, invert it, write everything."""
    config = parse(FeedbackConfig, argv, "expunge feedback")
    # torch is imported late so that --help and mistakes answer at once.
    from expunge.results import fresh_output_dir

    folder = Path(config.output_dir)
    _check_folder(config, folder)
    if not config.page:
        labels = read_labels(Path(str(config.labels)))
        labels.require_both()
        pipeline = _model(config)
    else:
        # Before somebody looks at a hundred pictures for a model that cannot learn from them.
        pipeline = _model(config)
        fresh_output_dir(folder, resume=True)
        labels = collect(config, folder, pipeline)
        labels.require_both()
    run(config, labels, pipeline)


def _model(config: FeedbackConfig) -> Any:
    """The model, which can learn what is to be learnt."""
    from expunge import backbones, inversion

    device = backbones.device_of(config.device)
    pipeline = backbones.load_pipeline(config.model, device=device)
    inversion.require(pipeline, config.token, config.inversion)
    return pipeline


def run(config: FeedbackConfig, labels: Labels, pipeline: Any) -> dict[str, Any]:
    """Learn from labels; what feedback.json says is returned.

    Raises:
        UserError: A picture or the CLIP is missing or broken; nothing was written.
    """
    import time

    from tqdm import tqdm

    from expunge import backbones, inversion, soft_tokens
    from expunge.clip import load_clip
    from expunge.densities.clip_head import write_head
    from expunge.densities.head_training import learn
    from expunge.encoding import to_latents
    from expunge.pictures import read_picture, save_png
    from expunge.results import (
        fresh_output_dir,
        provenance,
        sha256_file,
        write_json_atomic,
        write_text_atomic,
    )

    begun, folder = time.perf_counter(), Path(config.output_dir)
    device = backbones.device_of(config.device)
    files = [*labels.having(YES), *labels.having(NO)]
    head, report, logits = learn(
        labels.having(YES), labels.having(NO), load_clip(config.clip, device), config.name,
        seed=config.seed,
    )  # fmt: skip
    r = _rewards(logits, len(labels.having(YES)))
    shape = backbones.latent_shape(pipeline)
    latents = to_latents(pipeline.vae, shape, map(read_picture, files))
    losses: list[float] = []
    with tqdm(total=config.inversion.steps, desc="invert", unit="step", disable=None) as bar:

        def done(loss: float) -> None:
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()

        token = inversion.invert(
            pipeline, config.token, latents, r, config.inversion, config.seed, done
        )
    drawn, sheet = _draw(config, pipeline, head)
    fresh_output_dir(folder, resume=True)
    for name in DERIVED:  # the report first: what lies beside it belongs to it
        (folder / name).unlink(missing_ok=True)
    about = {"model": config.model, "seed": config.seed, "inversion": asdict(config.inversion)}
    soft_tokens.write(folder / TOKENS, token, about)
    write_head(folder / REWARD, head, {"classes": [NO, YES], "held_out": asdict(report)})
    save_png(sheet, folder / SAMPLES)
    write_text_atomic(folder / TRAIN, train_yaml(config, labels))
    fifth = max(1, len(losses) // 5)
    result = {
        "schema_version": 1,
        "token": config.token,
        **about,
        "labels": _labels(labels),
        "reward": _reward(report, head),
        "loss": {
            "first_fifth": sum(losses[:fifth]) / fifth,
            "last_fifth": sum(losses[-fifth:]) / fifth,
        },
        "norms": token.vectors[0].norm(dim=1).tolist(),
        "encoder_sha256": token.encoder["float16"],
        "drawn": drawn,
        "seconds": round(time.perf_counter() - begun, 1),
        "sha256": {name: sha256_file(folder / name) for name in (TOKENS, REWARD)},
        "provenance": provenance(),
    }
    write_json_atomic(folder / RESULT, result)
    _tell(folder, result)
    return result


def _check_folder(config: FeedbackConfig, folder: Path) -> None:
    """Take a new folder, or one of feedback; results of its own only with overwrite."""
    from expunge.results import MARKER, fresh_output_dir

    fresh_output_dir(folder, resume=True, dry_run=True)
    names = {item.name for item in folder.iterdir()} if folder.is_dir() else set()
    if names - {MARKER, LABELS, PICTURES, *DERIVED}:
        raise UserError(
            f"got output folder {folder}, which holds other results; allowed: a new or an empty "
            "folder, or one of feedback; choose another --output_dir"
        )
    if RESULT in names and not config.overwrite:
        raise UserError(
            f"got output folder {folder}, which already holds results; allowed: a new or an empty "
            "folder; choose another --output_dir, or say --overwrite true (labels stay)"
        )


def _rewards(logits: Tensor, yes: int) -> Tensor:
    """The reward r of each picture: of those labelled yes σ(f) up to a scale, of the others 0.

    f is the logit of a head that was trained without the picture, so that a label which the
    others contradict counts less.
    """
    import torch

    r: Tensor = logits.sigmoid()
    r = r / r[:yes].max()
    return torch.cat([r[:yes], torch.zeros_like(r[yes:])])


def _draw(config: FeedbackConfig, pipeline: Any, head: Head) -> tuple[dict[str, Any], Any]:
    """What the token draws now, and in how much of it the reward sees the concept."""
    import torch

    from expunge import backbones, pictures
    from expunge.clip import load_clip
    from expunge.generation import generate
    from expunge.results import Measurement

    prompts = [t.replace("{}", config.token) for t in config.inversion.templates]
    each = -(-DRAWN // len(prompts))
    images = generate(
        pipeline, [p for p in prompts for _ in range(each)], list(range(each)) * len(prompts),
        steps=config.sampling_steps,
        guidance_scale=backbones.recommended_guidance(config.model),
    )  # fmt: skip
    clip = load_clip(config.clip, backbones.device_of(config.device))
    with torch.no_grad():
        seen = head.logits(clip.encode_images(images.to(clip.device)).cpu()) > 0
    found = Measurement.proportion(int(seen.sum()), len(seen), higher_is_better=True)
    rows = [[pictures.to_pil(image) for image in part] for part in images.split(each)]
    judge = "the reward head itself, no independent judge"
    return {"seen": found.to_dict(), "by": judge}, pictures.sheet(rows, prompts)


def _labels(labels: Labels) -> dict[str, Any]:
    """Whose labels, how many, and their hash."""
    counts = {label or "open": len(labels.having(label)) for label in (YES, NO, OPEN)}
    return {"source": str(labels.source), **counts, "sha256": labels.sha256()}


def _reward(report: HeadReport, head: Head) -> dict[str, Any]:
    """What cross-validation says of the head."""
    from expunge.results import Measurement

    right = Measurement.proportion(
        report.right, report.harmful + report.benign, higher_is_better=True
    )
    return {
        "accuracy": right.to_dict(),
        "balanced_accuracy": report.accuracy,
        "auc": report.auc,
        "folds": report.folds,
        "clip": head.clip,
        "clip_sha256": head.sha256,
    }


def train_yaml(config: FeedbackConfig, labels: Labels) -> str:
    """A configuration that erases the token, with what is known to be harmless preserved."""
    import yaml

    preserve = list(dict.fromkeys([*config.preserve, *labels.harmless_prompts()]))
    folder = Path(config.output_dir)
    run = {
        "model": config.model,
        "concept": {
            "name": config.name,
            "targets": [config.token],
            "templates": config.inversion.templates,
            "preserve": ["", *preserve],
            "tokens": [str(folder / TOKENS)],
        },
        "objective": {"type": "hfi", "ema_decay": 0.9},
        "latents": {
            "type": "replay", "steps": 10, "source": "ema", "times": "beta", "beta": [3.0, 3.0],
            "rollouts": 64, "refresh": 40,
        },
        "preserve": {"weight": 2.0, "batch_size": 4},
        "lora": {"rank": 8, "alpha": 8},
        "steps": 400,
        "batch_size": 4,
        "learning_rate": 1.0e-3,
        "lr_scheduler": "cosine",
        "seed": config.seed,
    }  # fmt: skip
    head = (
        f"# HFI: erase {config.token}, which {len(labels.having(YES))} yes and "
        f"{len(labels.having(NO))} no taught.\n#\n"
        "# Held is what concept.preserve lists and no more: add what must stay.\n"
        f"# Launch: accelerate launch train_erase.py --config {folder / TRAIN} --output_dir OUT\n"
    )
    return head + yaml.safe_dump(run, sort_keys=False, allow_unicode=True)


def _tell(folder: Path, result: dict[str, Any]) -> None:
    def shown(m: dict[str, Any]) -> str:
        return f"{m['value']:.0%} [{m['low']:.0%}, {m['high']:.0%}], n = {m['n']}"

    print(f"reward, cross-validated: {shown(result['reward']['accuracy'])} of the labels right")
    print(f"{result['token']} drawn: {shown(result['drawn']['seen'])} as the reward sees it")
    print(f"{folder}: {', '.join(DERIVED)}")
    print(f"erase it: expunge train --config {folder / TRAIN} --output_dir OUT")
