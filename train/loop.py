"""The training loop, once for every objective."""

import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from expunge import adapters, backbones
from expunge.conditioning import Conditioning, condition
from expunge.errors import UserError
from expunge.train import memory
from expunge.train.checkpoints import Checkpoints
from expunge.train.config import TrainConfig
from expunge.train.latents import Maker, Request
from expunge.train.memory import Lender
from expunge.train.predictions import Inputs, Networks
from expunge.train.preserve import nearest
from expunge.train.share import Share


@dataclass
class Progress:
    """What is counted over the whole run, resumed or not."""

    step: int = 0
    seconds: float = 0.0
    forwards: dict[str, int] = field(default_factory=dict)
    base: str | None = None  # sha256 of the model that is erased from
    batch: tuple[int, int] = (0, 0)  # erased and retained samples of a step, over all processes

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
    """

    def __init__(
        self,
        config: TrainConfig,
        pipeline: Any,
        accelerator: Accelerator,
        folder: Path,
        base: str | None = None,
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
        # The VAE is needed for pictures alone, unless the objective looks at some itself.
        resting = [p for name, p in pipeline.components.items() if name.startswith("text_encoder")]
        if "guided/concept" not in objective.needs:
            resting.append(pipeline.vae)
        lender = Lender(resting if config.offload else [], accelerator.device)
        self.pictures = lender.lent
        self.embeddings = _Embeddings(pipeline, lender)
        self.near = self._neighbours()
        self.shape = backbones.latent_shape(pipeline)
        self.optimizer = memory.optimizer(config, self.parameters)
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
        if config.compile:
            memory.compile_blocks(unet)
        if accelerator.state.deepspeed_plugin is not None:  # it looks for a data loader otherwise
            settings = accelerator.state.deepspeed_plugin.deepspeed_config
            settings["train_micro_batch_size_per_gpu"] = config.batch_size
        wrapped, self.optimizer = accelerator.prepare(unet, self.optimizer)
        self.networks = Networks(unet, wrapped, pipeline.scheduler, self.ema, self.parameters)
        self.share = Share(accelerator.process_index, accelerator.num_processes)
        retained = config.preserve.batch_size if config.preserve.weight else 0
        batch = config.batch_size * self.share.count, retained * self.share.count
        self.progress = Progress(base=base, batch=batch)
        self.latents = config.latents.open()
        self.maker = Maker(
            self.networks, self.embeddings, config.concept.neutral, self.shape, self.share
        )
        self.guide = None
        if "guided/concept" in objective.needs:
            self.guide = objective.guide(pipeline, config.concept, self.maker)
        kept = (self.schedule, self.progress, self.ema, self.latents)
        accelerator.register_for_checkpointing(*(x for x in kept if hasattr(x, "state_dict")))
        self.checkpoints = Checkpoints(
            folder / "checkpoints", accelerator, unet, config.keep_checkpoints
        )
        if config.compile:
            with memory.compiler_needed():
                self._warm()

    def _warm(self) -> None:
        """Compile for the adapter off and on before anything is written or timed."""
        samples = sum(self.progress.batch) // self.share.count
        x_t = torch.zeros(samples, *self.shape, device=self.accelerator.device)
        null = self.embeddings([self.config.concept.neutral]).expand(samples)
        inputs = Inputs(x_t, x_t.new_zeros(samples).long(), null)
        found = self.networks.predict({"teacher/null": inputs, "student/null": inputs})
        self.accelerator.backward(found["student/null"].mean())
        self.optimizer.zero_grad()
        self.networks.forwards = Counter(dict.fromkeys(self.networks.forwards, 0))

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one.

        Raises:
            UserError: It cannot be read, or is of another model or another batch.
        """
        progress, base, batch = self.progress, self.progress.base, self.progress.batch
        if not self.checkpoints.load_newest():
            return
        if progress.base != base:
            raise UserError(
                f"got a model {self.config.model} whose files are not those the run began with; "
                "allowed: to resume on the same weights; restore them, or say --overwrite true"
            )
        if progress.batch != batch:
            raise UserError(
                f"got {batch[0]} erased and {batch[1]} retained samples a step over all processes; "
                f"allowed: those the run began with, {progress.batch[0]} and {progress.batch[1]}; "
                "on another number of processes change batch_size and preserve.batch_size to match"
            )
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # accelerate restores it on the CPU

    def run(self, validate: Callable[[int], None]) -> None:
        """Train to the last step; `validate(step)` is called when pictures are due."""
        config, accelerator, progress = self.config, self.accelerator, self.progress
        earlier = Counter(progress.forwards)  # of any number of processes
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
            progress.forwards = {k: earlier[k] + n for k, n in self._forwards().items()}
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

    def _forwards(self) -> dict[str, int]:
        """Passes of all processes since the run began or went on."""
        own = self.networks.forwards
        counts = torch.tensor(list(own.values()), device=self.accelerator.device)
        total = self.accelerator.reduce(counts, "sum")
        return dict(zip(own, total.tolist(), strict=True))

    def _neighbours(self) -> list[str]:
        """The retained prompts nearest to the targets."""
        keep, concept = self.config.preserve, self.config.concept
        texts = [prompt for prompt in concept.retained() if prompt]
        if not (keep.weight and keep.neighbours and texts):
            return []
        targets, others = (self.embeddings(p).states for p in (concept.targets, texts))
        return [texts[i] for i in nearest(targets, others, keep.neighbours)]

    def _optimise(self, step: int) -> dict[str, float]:
        config, accelerator = self.config, self.accelerator
        sums: dict[str, float] = {}
        for micro in range(config.gradient_accumulation):
            with accelerator.accumulate(self.networks.wrapped):
                terms = self._losses(step * config.gradient_accumulation + micro)
                values = torch.stack(list(terms.values()))
                loss = values.sum()
                # Of all processes, so that they log, and give up, together.
                values = accelerator.reduce(values.detach(), "mean")
                if not torch.isfinite(values).all():
                    raise FloatingPointError(
                        f"the loss is {values.sum()} at step {step}; lower learning_rate"
                    )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)
                    if norm is not None:  # DeepSpeed knows it a step late
                        sums["grad_norm"] = float(norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in zip(terms, values.tolist(), strict=True):
                sums[name] = sums.get(name, 0.0) + value / config.gradient_accumulation
        if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step that overflowed
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        return sums | {"learning_rate": self.schedule.get_last_lr()[0]}

    def _losses(self, draw: int) -> dict[str, Tensor]:
        """The loss terms of this process's share of a micro-batch; `draw` decides what is drawn."""
        config, objective, concept = self.config, self.config.objective, self.config.concept
        # Nothing is carried over from draw to draw, so that a resumed run is exact; every process
        # draws the whole batch, so that their number changes nothing.
        rng = random.Random(f"{config.seed}/{draw}/0")
        erased_all, retained_all = self.progress.batch
        generator = torch.Generator().manual_seed(rng.getrandbits(63))

        def ask() -> Request:
            erased = [objective.prompts(concept, rng) for _ in range(erased_all)]
            keep = replace(config.preserve, batch_size=max(1, retained_all))
            return Request(erased, keep.prompts(concept, rng, self.near))

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
    """What the UNet is told of a prompt, each encoded once and kept on the CPU."""

    def __init__(self, pipeline: Any, encoders: Lender):
        self.pipeline, self.encoders = pipeline, encoders
        self.known: dict[str, Conditioning] = {}

    def __call__(self, prompts: list[str]) -> Conditioning:
        """Of B prompts."""
        if new := [p for p in dict.fromkeys(prompts) if p not in self.known]:
            with self.encoders.lent():
                encoded = condition(self.pipeline, new).to("cpu")
            self.known.update({p: encoded[i : i + 1] for i, p in enumerate(new)})
        found = Conditioning.cat([self.known[prompt] for prompt in prompts])
        return found.to(self.pipeline.unet.device)


def peak_memory_bytes() -> int:
    """The most memory that was used: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts kilobytes, macOS bytes.
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
