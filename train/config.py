"""The configuration of a training run: nested, strict, YAML and command line alike."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from expunge.concepts import Concept
from expunge.train import LATENTS, PROBES, pictured
from expunge.train.objectives import OBJECTIVES
from expunge.train.preserve import Preserve
from expunge.train.robust import Robust
from expunge.train.several import Several
from expunge.train.sight import Gate
from expunge.train.tamper import Tamper


@dataclass(frozen=True)
class Lora:
    """The adapter: ΔW = (alpha / rank) B A.

    Attributes:
        rank: Rows of A.
        alpha: Scale; equal to the rank it is 1.
        targets: Module group (`x`, `x-strict`, `u`, `all`); default: what the objective trains.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: Literal["x", "x-strict", "u", "all"] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError(f"got {self}; allowed: rank 1 or more, alpha above 0 and finite")


@dataclass(frozen=True)
class Validation:
    """Pictures of the student, during training and after it, below the base's of the same seeds.

    Attributes:
        every: Steps between two sheets; 0 makes only the last one.
        prompts: What to draw; default: the concept's prompts and some that must stay.
        seeds: Pictures of each prompt.
        steps: Denoising steps.
        guidance_scale: Default: what suits the model.
    """

    every: int = 0
    prompts: list[str] = field(default_factory=list)
    seeds: int = 4
    steps: int = 25
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if self.every < 0 or self.seeds < 1 or not 1 <= self.steps <= 1000:
            raise ValueError(
                f"got {self}; allowed: every 0 or more, seeds 1 or more, steps 1 to 1000"
            )
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"got validation.guidance_scale {self.guidance_scale}; allowed: 0 or more and "
                "finite; leave it out for what suits the model"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run."""

    output_dir: str = field(metadata={"help": "folder for the LoRA and all that belongs to it"})
    concept: Concept = field(metadata={"help": "what is erased and what stays"})
    model: str = field(default="emoji", metadata={"help": "emoji, a diffusers folder, a hub id"})
    family: Literal["sd1", "sd2", "sdxl"] | None = field(
        default=None, metadata={"help": "what the settings are for: refuse a model of another kind"}
    )
    objective: Annotated[Any, OBJECTIVES] = field(default_factory=lambda: OBJECTIVES.load("esd")())
    latents: Annotated[Any, LATENTS] = field(default_factory=lambda: LATENTS.load("rollout")())
    gate: Gate | None = field(
        default=None, metadata={"help": "erase only where a density sees the concept"}
    )
    several: Several = field(default_factory=Several)
    robust: Robust | None = field(
        default=None, metadata={"help": "against words that would bring the concept back"}
    )
    tamper: Tamper | None = field(
        default=None, metadata={"help": "against fine-tuning that would bring the concept back"}
    )
    preserve: Preserve = field(default_factory=Preserve)
    start: Annotated[Any, OBJECTIVES] | None = field(
        default=None, metadata={"help": "uce or rece: a closed form whose edit it begins with"}
    )
    lora: Lora = field(default_factory=Lora)
    steps: int = field(default=200, metadata={"help": "optimiser steps"})
    batch_size: int = field(default=1, metadata={"help": "concept samples, on each process"})
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = field(
        default="adamw", metadata={"help": "adamw8bit needs a GPU and bitsandbytes"}
    )
    base_precision: Literal["fp32", "fp16", "bf16", "nf4"] = field(
        default="fp32",
        metadata={"help": "of the frozen weights, the LoRA is fp32; nf4 needs a GPU, bitsandbytes"},
    )
    offload: bool = field(
        default=False, metadata={"help": "text encoders and VAE on the CPU while they rest"}
    )
    compile: bool = field(default=False, metadata={"help": "compile the UNet's transformer blocks"})
    seed: int = 0
    checkpoint_every: int = field(default=50, metadata={"help": "steps; 0 keeps none"})
    keep_checkpoints: int = 2
    validation: Validation = field(default_factory=Validation)
    probe: Annotated[Any, PROBES] | None = field(
        default=None, metadata={"help": "erased and kept so far, judged during training"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint"})
    overwrite: bool = field(default=False, metadata={"help": "throw earlier results away"})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}; allowed: 1 or more")
        for name in ("checkpoint_every", "warmup", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"got {name} {getattr(self, name)}; allowed: 0 or more")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"got {name} {getattr(self, name)}; allowed: above 0")
        for name in ("learning_rate", "weight_decay"):
            if math.isinf(getattr(self, name)):
                raise ValueError(f"got {name} inf; allowed: a finite one, say 1e-3")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"got seed {self.seed}; allowed: 0 to 2⁶³ − 1")
        if self.warmup and self.lr_scheduler == "constant":
            raise ValueError(
                f"got warmup {self.warmup} with lr_scheduler constant, which has none; allowed: "
                "constant_with_warmup, linear, cosine"
            )
        if self.base_precision == "nf4" and self.start is not None:
            raise ValueError(
                "got base_precision nf4 with start, which reads the weights themselves; allowed: "
                "bf16, or no start"
            )
        if self.concept.images and not pictured.looked_at(self):
            raise ValueError(
                f"got concept.images {self.concept.images} with nothing that looks at pictures of "
                "the concept; allowed: latents.type noised where x_t shows the concept (no anchor, "
                "subject or twin), or a density clip_images in objective or gate, without a folder "
                "of their own; or leave images out"
            )
        latents = pictured.latents_of(self)
        drawn = getattr(latents, "knows_noise", False) and not latents.folder
        if self.several.order == "balanced" and drawn:
            raise ValueError(
                "got several.order balanced with latents that are drawn once, before anything is "
                "known; allowed: order random; or latents.type replay or rollout"
            )
        draws = self.steps * self.gradient_accumulation
        refresh = getattr(self.latents, "refresh", 0)
        if self.several.order == "balanced" and refresh >= draws:
            raise ValueError(
                f"got several.order balanced with latents.refresh {refresh}: the only bank of all "
                f"{draws} batches is made before anything is known; allowed: order random; or "
                f"latents.refresh below {draws}, say {max(1, draws // 3)}"
            )
        if self.base_precision == "fp16" and self.mixed_precision != "fp16":
            raise ValueError(
                f"got base_precision fp16 with mixed_precision {self.mixed_precision}; allowed: "
                "fp16, whose loss scaling keeps small gradients; or say base_precision bf16"
            )
        if self.base_precision != "fp32" and hasattr(self.objective, "fit"):
            raise ValueError(
                f"got base_precision {self.base_precision} with an objective in closed form, which "
                "solves for the weights themselves; allowed: fp32"
            )
        if getattr(self.latents, "source", None) == "ema" and not self.objective.ema_decay:
            raise ValueError(
                "got latents.source ema with an objective that keeps no average; allowed: teacher, "
                "student"
            )
        if "noise/made" in getattr(self.objective, "needs", ()) and not getattr(
            self.latents, "knows_noise", False
        ):
            raise ValueError(
                "got an objective that learns the true noise, with latents that do not know it; "
                "allowed: latents.type noised"
            )
        if "twin/made" in getattr(self.objective, "needs", ()):
            if self.start is None:
                raise ValueError(
                    "got objective twin without start: the student would draw its twins as the "
                    "teacher draws the concept; allowed: start.type uce or rece"
                )
            if self.latents.folder:
                raise ValueError(
                    "got objective twin with latents.folder, whose pictures have no twins; "
                    "allowed: pictures that are drawn; leave the folder out"
                )
        anchors = map(self.concept.anchor_of, self.concept.targets)
        if getattr(self.objective, "wants_anchor", False) and not all(map(str.strip, anchors)):
            raise ValueError(
                "got no concept.anchor with an objective that maps the concept onto one; allowed: "
                'a text to take its place, say --concept.anchor "a balloon", or concept.anchors'
            )
        if self.start is not None and not hasattr(self.start, "fit"):
            raise ValueError(
                f"got start {type(self.start).__name__}, which is trained; allowed: an objective "
                "in closed form, uce or rece"
            )
        if hasattr(self.objective, "fit") and (self.start or self.gate or self.robust):
            raise ValueError(
                "got start, gate or robust with an objective in closed form, which has no training "
                "loss; allowed: an objective that is trained; leave them out"
            )
        if hasattr(self.objective, "fit") and (
            self.probe or self.lora.targets or self.several != Several()
        ):
            raise ValueError(
                "got probe, several or lora.targets with an objective in closed form, which edits "
                "all targets at once and its own layers; allowed: an objective that is trained; "
                "leave them out"
            )
        own = "student/concept" in getattr(self.objective, "needs", ("student/concept",))
        if (self.gate or self.robust) and not own:
            raise ValueError(
                "got gate or robust with an objective that teaches another prompt than the "
                "concept's; allowed: one that teaches the concept's; leave out erase_from, subject "
                "and attributes, or gate and robust"
            )
        if getattr(self.latents, "unprompted", 0) and not own:
            raise ValueError(
                "got latents.unprompted with an objective that teaches another prompt than the "
                "concept's, which would still be read; allowed: one that teaches the concept's; "
                "leave out erase_from, subject and attributes, or set unprompted 0"
            )
        if self.tamper and not getattr(self.latents, "knows_noise", False):
            raise ValueError(
                "got tamper with latents that are no pictures with noise on them, from which an "
                "attacker could learn; allowed: latents of type noised"
            )
        if self.tamper and self.compile:
            raise ValueError(
                "got tamper with compile, whose graphs do not see what an attacker changes; "
                "allowed: one of them"
            )
        if getattr(self.latents, "coreset", 0) and not self.preserve.weight:
            raise ValueError(
                f"got latents.coreset {self.latents.coreset} with preserve.weight 0, so that there "
                "is nothing retained to choose from; allowed: coreset 0, or preserve.weight above 0"
            )
        if self.preserve.weight and hasattr(self.objective, "fit"):
            raise ValueError(
                "got preserve.weight above 0 with an objective in closed form, which has no "
                "training loss; allowed: 0; say objective.preserve_scale"
            )
        if self.preserve.weight and not self.concept.retained():
            raise ValueError(
                "got preserve.weight above 0 with no prompt in concept.preserve; allowed: one or "
                "more that name no target; add some, or set preserve.weight 0"
            )
        if self.preserve.weight and self.preserve.pairs and not self.preserve.nouns(self.concept):
            raise ValueError(
                "got preserve.pairs above 0 with no prompt of one to three words in "
                'concept.preserve; allowed: one or more, as in "a cat face"; add some, or set '
                "preserve.pairs 0"
            )
