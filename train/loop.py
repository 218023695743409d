"""The training loop, once for every objective."""

import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from expunge import adapters, backbones
from expunge.errors import UserError
from expunge.train.checkpoints import Checkpoints
from expunge.train.config import TrainConfig
from expunge.train.latents import Maker, Request
from expunge.train.predictions import Inputs, Networks
from expunge.train.preserve import nearest


@dataclass
class Progress:
    """What is counted over the whole run, resumed or not."""

    step: int = 0
    seconds: float = 0.0
    forwards: dict[str, int] = field(default_factory=dict)
    base: str | None = None  # sha256 of the model that is erased from
    tokens: dict[str, str] = field(default_factory=dict)  # sha256 of each soft token's file

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From plain values."""
        for name, value in state.items():
            setattr(self, name, value)


class Trainer:
    """Distil an objective into a LoRA.

    Args:
        config: The run.
        pipeline: The model; its UNet is given the adapter.
        accelerator: Devices, precision, accumulation, logs.
        folder: For checkpoints and logs.
        base: SHA-256 of the model's files; None when they are not at hand.
        tokens: SHA-256 of the file of each soft token that the pipeline was given.
    """

    def __init__(
        self,
        config: TrainConfig,
        pipeline: Any,
        accelerator: Accelerator,
        folder: Path,
        base: str | None = None,
        tokens: dict[str, str] | None = None,
    ) -> None:
        self.config, self.pipeline, self.accelerator = config, pipeline, accelerator
        self.unet = unet = pipeline.unet
        objective = config.objective
        modules = backbones.modules_of(unet, config.lora.targets or objective.modules)
        self.parameters = adapters.attach(
            unet, modules, config.lora.rank, config.lora.alpha, config.seed
        )
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        self.embeddings = _Embeddings(pipeline)
        self.near = self._neighbours()
        self.shape = backbones.latent_shape(pipeline)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.warmup,
            num_training_steps=config.steps,
        )
        self.ema = None
        if objective.ema_decay:
            self.ema = EMAModel(self.parameters, decay=objective.ema_decay, use_ema_warmup=True)
            self.ema.to(accelerator.device)
        wrapped, self.optimizer = accelerator.prepare(unet, self.optimizer)
        self.networks = Networks(unet, wrapped, pipeline.scheduler, self.ema, self.parameters)
        self.progress = Progress(base=base, tokens=tokens or {})
        self.latents = config.latents.open()
        self.maker = Maker(self.networks, self.embeddings, config.concept.neutral, self.shape)
        self.guide = None
        if "guided/concept" in objective.needs:
            self.guide = objective.guide(pipeline, config.concept, self.maker)
        kept = (self.schedule, self.progress, self.ema, self.latents)
        accelerator.register_for_checkpointing(*(x for x in kept if hasattr(x, "state_dict")))
        self.checkpoints = Checkpoints(
            folder / "checkpoints", accelerator, unet, config.keep_checkpoints
        )

    def run(self, validate: Callable[[int], None]) -> None:
        """Train to the last step; `validate(step)` is called when pictures are due."""
        config, accelerator, progress = self.config, self.accelerator, self.progress
        begun_with = progress.base, progress.tokens
        if config.resume and self.checkpoints.load_newest():
            if (progress.base, progress.tokens) != begun_with:
                raise UserError(
                    f"got a model {config.model} or soft tokens whose files are not those the run "
                    "began with; allowed: to resume on the same weights; restore them, or say "
                    "--overwrite true"
                )
            for name, n in progress.forwards.items():
                self.networks.forwards[name] = n // accelerator.num_processes
            if self.ema is not None:
                self.ema.to(accelerator.device)  # accelerate restores it on the CPU
        begun = time.perf_counter() - progress.seconds
        bar = tqdm(
            total=config.steps,
            initial=progress.step,
            unit="step",
            disable=not accelerator.is_main_process or not sys.stderr.isatty(),
        )
        while progress.step < config.steps:
            logs = self._optimise(progress.step)
            progress.step += 1
            progress.seconds = time.perf_counter() - begun
            # Every process does the same number of passes.
            passes = self.networks.forwards.items()
            progress.forwards = {name: n * accelerator.num_processes for name, n in passes}
            accelerator.log(logs, step=progress.step)
            bar.update()
            bar.set_postfix({k: f"{v:.4f}" for k, v in logs.items() if k != "learning_rate"})
            last = progress.step == config.steps
            if config.checkpoint_every and (progress.step % config.checkpoint_every == 0 or last):
                self.checkpoints.save(progress.step)
            # The last sheet is made by whoever called, of every run.
            if (
                config.validation.every
                and progress.step % config.validation.every == 0
                and not last
            ):
                validate(progress.step)
        bar.close()

    def _neighbours(self) -> list[str]:
        """The retained prompts nearest to the targets."""
        keep, concept = self.config.preserve, self.config.concept
        texts = [prompt for prompt in concept.retained() if prompt]
        if not (keep.weight and keep.neighbours and texts):
            return []
        targets = self.embeddings(concept.targets)
        return [texts[i] for i in nearest(targets, self.embeddings(texts), keep.neighbours)]

    def _optimise(self, step: int) -> dict[str, float]:
        config, accelerator = self.config, self.accelerator
        sums: dict[str, float] = {}
        for micro in range(config.gradient_accumulation):
            with accelerator.accumulate(self.networks.wrapped):
                terms = self._losses(step * config.gradient_accumulation + micro)
                loss = torch.stack(list(terms.values())).sum()
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss is {loss.item()} at step {step}; lower learning_rate"
                    )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)
                    sums["grad_norm"] = float(norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() / config.gradient_accumulation
        if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step that overflowed
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        return sums | {"learning_rate": self.schedule.get_last_lr()[0]}

    def _losses(self, draw: int) -> dict[str, Tensor]:
        """The loss terms of one micro-batch; `draw` alone decides what is drawn."""
        config, objective, concept = self.config, self.config.objective, self.config.concept
        # Nothing is carried over from draw to draw, so that a resumed run is exact.
        rng = random.Random(f"{config.seed}/{draw}/{self.accelerator.process_index}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))

        def ask() -> Request:
            erased = [objective.prompts(concept, rng) for _ in range(config.batch_size)]
            return Request(erased, config.preserve.prompts(concept, rng, self.near))

        request, x_t, t = self.latents.batch(ask, self.maker, generator, draw)
        erased, retained, n = request.erased, request.retained, len(request.erased)
        texts = {
            "concept": [prompt for _, prompt in erased],
            "null": [concept.neutral] * n,
            "anchor": [concept.anchor] * n,
        }
        wanted = {
            name: Inputs(x_t[:n], t[:n], self.embeddings(texts[name.split("/")[1]]))
            for name in objective.needs
            if not name.startswith("guided/")
        }
        for network, column in (("student", 0), ("teacher", 1)) if retained else ():
            prompts = [pair[column] for pair in retained]
            wanted[f"{network}/retained"] = Inputs(x_t[n:], t[n:], self.embeddings(prompts))
        # No autocast around all of it: every prepared forward has its own, and one cache of casts
        # for passes with and without gradient would lose the gradient.
        found = self.networks.predict(wanted)
        if self.guide is not None:
            found["guided/concept"] = self.guide(found, x_t[:n], t[:n])
        losses = {"erase": objective.loss(found).mean()}
        if retained:
            kept = config.preserve.loss(found["student/retained"], found["teacher/retained"])
            losses["preserve"] = kept.mean()
        return losses


class _Embeddings:
    """Text embeddings, each prompt encoded once."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.known: dict[str, Tensor] = {}

    def __call__(self, prompts: list[str]) -> Tensor:
        """(B, T, D) of B prompts."""
        if new := [p for p in dict.fromkeys(prompts) if p not in self.known]:
            encoded = backbones.encode_prompts(self.pipeline, new)
            self.known.update(zip(new, encoded, strict=True))
        return torch.stack([self.known[prompt] for prompt in prompts])


def peak_memory_bytes() -> int:
    """The most memory that was used: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts kilobytes, macOS bytes.
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
