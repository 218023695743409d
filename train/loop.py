"""The training loop, once for every objective."""

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
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
from expunge.train import footprint, pictured
from expunge.train.accelerated import settle
from expunge.train.checkpoints import Checkpoints
from expunge.train.closed_form.install import install
from expunge.train.config import TrainConfig
from expunge.train.footprint import Lender
from expunge.train.latents import Maker
from expunge.train.losses import Embeddings, Losses
from expunge.train.predictions import Inputs, Networks
from expunge.train.share import Share
from expunge.train.tamper import Tampering

ROUNDING = 1e-10  # mean squares of ε below it are no difference in float32


@dataclass
class Progress:
    """What is counted over the whole run, resumed or not."""

    step: int = 0
    seconds: float = 0.0
    forwards: dict[str, int] = field(
        default_factory=lambda: {"teacher": 0, "student": 0, "sampling": 0}
    )
    sights: dict[str, int] = field(default_factory=lambda: {"looked": 0, "seen": 0})
    clips: list[str] = field(default_factory=list)  # the eyes that a density sees through
    base: str | None = None  # identity of the model that is erased from
    batch: tuple[int, int] = (0, 0)  # erased and retained samples of a step, over all processes
    probes: dict[str, dict[str, float]] = field(default_factory=dict)  # step -> rates
    stopped: bool = False  # by the probe
    tokens: dict[str, str] = field(default_factory=dict)  # sha256 of each soft token's file
    svd_error: float | None = None  # what the LoRA lacks of a closed form's edit

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
        base: Identity of the model, which a resumption must find again.
        probe: Looks at the student now and then; see `expunge.train.PROBES`.
        tokens: SHA-256 of the file of each soft token that the pipeline was given.
    """

    def __init__(
        self,
        config: TrainConfig,
        pipeline: Any,
        accelerator: Accelerator,
        folder: Path,
        base: str | None = None,
        probe: Any = None,
        tokens: dict[str, str] | None = None,
    ) -> None:
        self.probe = probe
        self.config, self.pipeline, self.accelerator = config, pipeline, accelerator
        self.unet = unet = pipeline.unet
        objective = config.objective
        learn = backbones.modules_of(unet, config.lora.targets or objective.modules)
        moved = backbones.modules_of(unet, config.tamper.layers) if config.tamper else []
        began = time.perf_counter()
        edit, edited = None, []
        if config.start is not None:
            edit = config.start.fit(pipeline, config.concept)
            edited = backbones.modules_of(unet, config.start.modules)
        # Where nothing learns, the LoRA has the closed form's edit alone.
        fixed = [name for name in edited if name not in learn]
        self.parameters = adapters.attach(
            unet, learn + fixed, config.lora.rank, config.lora.alpha, config.seed, fixed
        )
        lost = install(edit, unet, edited, learns=True) if edit is not None else None
        seconds = time.perf_counter() - began if edit is not None else 0.0
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        self.lender = Lender(self._resting() if config.offload else [], accelerator.device)
        self.optimizer = footprint.optimizer(config, self.parameters)
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
            footprint.compile_blocks(unet)
        if accelerator.state.deepspeed_plugin is not None:
            settle(accelerator.state.deepspeed_plugin.deepspeed_config, config)
        wrapped, self.optimizer = accelerator.prepare(unet, self.optimizer)
        self.networks = Networks(unet, wrapped, pipeline.scheduler, self.ema, self.parameters)
        self.tampering = None
        if config.tamper:
            self.tampering = Tampering(config.tamper, self.networks, moved, config.seed)
            self.networks.untampered = partial(self.tampering.applied, False)
        self.share = Share(accelerator.process_index, accelerator.num_processes)
        retained = config.preserve.batch_size if config.preserve.weight else 0
        batch = config.batch_size * self.share.count, retained * self.share.count
        self.progress = Progress(
            seconds=seconds, base=base, batch=batch, tokens=tokens or {}, svd_error=lost
        )
        self.latents = pictured.latents_of(config).open()
        self.maker = Maker(
            self.networks,
            Embeddings(pipeline, self.lender),
            config.concept.neutral,
            backbones.latent_shape(pipeline),
            pipeline.vae,
            "twin/made" in objective.needs,
            self.share,
        )
        self.losses = Losses(config, pipeline, self.maker, self.latents)
        losses = self.losses
        self.progress.clips = losses.clips()
        kept = (
            self.schedule, self.progress, self.ema, self.latents, losses.turns, losses.attack,
            self.tampering,
        )  # fmt: skip
        accelerator.register_for_checkpointing(*(x for x in kept if hasattr(x, "state_dict")))
        self.checkpoints = Checkpoints(
            folder / "checkpoints", accelerator, unet, config.keep_checkpoints
        )
        if config.compile:
            with footprint.compiler_needed():
                self._warm()

    def _warm(self) -> None:
        """Compile for the adapter off and on before anything is written or timed."""
        samples = sum(self.progress.batch) // self.share.count
        x_t = torch.zeros(samples, *self.maker.shape, device=self.accelerator.device)
        null = self.maker.embed([self.config.concept.neutral]).expand(samples)
        inputs = Inputs(x_t, x_t.new_zeros(samples).long(), null)
        found = self.networks.predict({"teacher/null": inputs, "student/null": inputs})
        self.accelerator.backward(found["student/null"].mean())
        self.optimizer.zero_grad()
        self.networks.forwards = Counter(dict.fromkeys(self.networks.forwards, 0))

    def _resting(self) -> list[Any]:
        """What is needed now and then only: text encoders, and for pictures the autoencoder."""
        config, parts = self.config, self.pipeline.components
        found = [] if config.robust else [p for n, p in parts.items() if n.startswith("text_enc")]
        looks = "guided/concept" in config.objective.needs or config.gate
        return found if looks else [*found, self.pipeline.vae]

    @contextmanager
    def pictures(self) -> Iterator[None]:
        """Inside, the pipeline can draw: all its parts are at hand, and in one precision.

        Under mixed precision accelerate has the UNet answer in float32, which a VAE of a reduced
        base cannot decode.
        """
        dtype = self.unet.conv_in.weight.dtype

        def cast(unet: Any, inputs: Any, answer: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(part.to(dtype) for part in answer)

        hook = self.unet.register_forward_hook(cast)
        try:
            with self.lender.lent():
                yield
        finally:
            hook.remove()

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one.

        Raises:
            UserError: It cannot be read, or is of another model or another batch.
        """
        progress, batch = self.progress, self.progress.batch
        begun_with = progress.base, progress.tokens
        if not self.checkpoints.load_newest():
            return
        if (progress.base, progress.tokens) != begun_with:
            raise UserError(
                f"got a model {self.config.model} or soft tokens whose files are not those the run "
                "began with; allowed: to resume on the same weights; restore them, or say "
                "--overwrite true"
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
        # Of any number of processes.
        earlier, earlier_sights = Counter(progress.forwards), Counter(progress.sights)
        begun = time.perf_counter() - progress.seconds
        bar = tqdm(
            total=config.steps,
            initial=progress.step,
            unit="step",
            disable=not accelerator.is_main_process or not sys.stderr.isatty(),
        )
        if config.probe and config.start and not progress.step:
            self._look(bar)  # it may be erased already
            begun = time.perf_counter() - progress.seconds
        while progress.step < config.steps and not progress.stopped:
            logs = self._optimise(progress.step)
            progress.step += 1
            progress.seconds = time.perf_counter() - begun
            forwards, sights = self._sum(self.networks.forwards), self._sum(self.losses.sights())
            progress.forwards = {k: earlier[k] + n for k, n in forwards.items()}
            progress.sights = {k: earlier_sights[k] + n for k, n in sights.items()}
            accelerator.log(logs, step=progress.step)
            bar.update()
            bar.set_postfix({k: f"{v:.4f}" for k, v in logs.items() if k != "learning_rate"})
            if config.probe and progress.step % config.probe.every == 0:
                self._look(bar)
                begun = time.perf_counter() - progress.seconds
            last = progress.step == config.steps or progress.stopped
            if config.checkpoint_every and (progress.step % config.checkpoint_every == 0 or last):
                self.checkpoints.save(progress.step)
            # The last sheet is made by whoever called, of every run.
            if (
                config.validation.every
                and progress.step % config.validation.every == 0
                and not last
            ):
                validate(progress.step)
                begun = time.perf_counter() - progress.seconds
        bar.close()

    def _look(self, bar: Any) -> None:
        """Ask the probe; it may end the training. Its time is not the training's."""
        accelerator, progress = self.accelerator, self.progress
        done = torch.zeros(1, device=accelerator.device)
        if accelerator.is_main_process:
            with self.networks.averaged(), self.pictures():
                rates = self.probe()
            cost = {"unet_forwards": sum(progress.forwards.values()), "seconds": progress.seconds}
            progress.probes[str(progress.step)] = rates | cost | {"good": self.probe.good(rates)}
            accelerator.log({f"probe/{k}": v for k, v in rates.items()}, step=progress.step)
            shown = ", ".join(f"{name} {100 * rate:.0f} %" for name, rate in rates.items())
            bar.write(f"step {progress.step}: {shown}", file=sys.stderr)
            done += self.probe.satisfied(rates)
        progress.stopped = bool(accelerator.reduce(done).item())

    def _sum(self, own: Mapping[str, int]) -> dict[str, int]:
        """Counts of all processes since the run began or went on."""
        counts = torch.tensor(list(own.values()), device=self.accelerator.device)
        total = self.accelerator.reduce(counts, "sum")
        return dict(zip(own, total.tolist(), strict=True))

    def _tampered(self, step: int) -> AbstractContextManager[None]:
        """Now and then, the weights that an attacker's fine-tuning has come to."""
        if self.tampering is None or not self.tampering.due(step):
            return nullcontext()
        return self.tampering.applied()

    def _optimise(self, step: int) -> dict[str, float]:
        config, accelerator = self.config, self.accelerator
        sums: dict[str, float] = {}
        for micro in range(config.gradient_accumulation):
            with accelerator.accumulate(self.networks.wrapped), self._tampered(step):
                terms = self.losses(step * config.gradient_accumulation + micro)
                values = torch.stack(list(terms.values()))
                loss = values.sum()
                # Of all processes, so that they log, and give up, together.
                values = accelerator.reduce(values.detach(), "mean")
                if not torch.isfinite(values).all():
                    raise FloatingPointError(
                        f"the loss is {values.sum()} at step {step}; lower learning_rate"
                    )
                # Student and teacher are the same here but for rounding, which Adam would blow up.
                accelerator.backward(loss if values.sum() > ROUNDING else loss * 0.0)
                if self.losses.attack is not None:
                    self.losses.attack.climb(lambda g: accelerator.reduce(g, "mean"))
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
        if self.tampering is not None:
            drawn = self.latents
            prompts = [made for made, _ in drawn.prompts["erased"]] or config.concept.prompts()
            sums["attacker"] = self.tampering.advance(
                step, drawn.latents["erased"], prompts, self.maker.embed
            )
        return sums | {"learning_rate": self.schedule.get_last_lr()[0]}


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that was used: of the GPU if that is the device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts kilobytes, macOS bytes.
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
