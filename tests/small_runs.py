"""Training runs that take a second, for the tests of everything around a run."""

import dataclasses
from pathlib import Path

from expunge.concepts import Concept
from expunge.densities.clip_text import ClipText
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
from expunge.train.objectives.twin import Twin
from expunge.train.objectives.uce import Uce
from expunge.train.preserve import Preserve
from expunge.train.robust import Robust
from expunge.train.several import Several
from expunge.train.sight import Gate
from expunge.train.tamper import Tamper


def small_run(model: str, folder: Path, **changes) -> TrainConfig:
    """Four steps on a tiny model; `changes` are fields of the configuration."""
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


ANCHORED = Concept(targets=["a bomb"], anchor="a balloon", preserve=["", "a key"])
# Every trained objective, and what goes with any of them, as changes of `small_run`.
KINDS = {
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
    "twin": {
        "objective": Twin(),
        "start": Uce(),
        "latents": Noised(count=6, steps=2, unprompted=0.5),
        "robust": Robust(restart=3),
        "tamper": Tamper(restart=3, learning_rate=1e-2, batch_size=3),
    },
    "twin-fixed": {
        "objective": Twin(layers="u"),
        "start": Uce(),
        "latents": Noised(count=6, steps=2),
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
