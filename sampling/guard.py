"""Guard a pipeline: its pictures are corrected while they are made, where a density says so."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge import guidance, prediction
from expunge.densities.base import HarmDensity
from expunge.errors import UserError
from expunge.guidance import Decode
from expunge.prediction import Level
from expunge.sampling.branch import Branch
from expunge.sampling.correction import Correction
from expunge.sampling.denoiser_hook import arguments
from expunge.sampling.graft import graft
from expunge.sampling.guard_trace import Step, Trace
from expunge.sampling.safe_scheduler import SafeScheduler, safe_scheduler

LARGEST_ICON = 128  # pixels; the bundled model draws 64


class Guard:
    """The state of one guarded call: who shows what, who ever did, with what momentum.

    Args:
        density: p_h with its thresholds.
        decode: Exact decoder, for gradients.
        look: Decoder for the gate; it may be a cheap one.
        how: How x̂0 is corrected.
        texts: Of `text` direction, one for each concept of the density.
    """

    def __init__(
        self,
        density: HarmDensity,
        decode: Decode,
        look: Decode,
        how: Correction,
        texts: Sequence[str] = (),
    ) -> None:
        self.density, self.decode, self.look, self.how = density, decode, look, how
        self.texts = list(texts)
        if how.direction == "text" and len(self.texts) != len(density.names):
            raise UserError(
                f"got {len(self.texts)} texts for {len(density.names)} concepts of the density; "
                "allowed: a prompt for each, for direction text; or choose direction gradient"
            )
        # A push in the prediction belongs to the noise as well; the published one does not.
        self.keeps_noise = how.direction == "gradient"
        self.branch: Branch | None = None
        self.trace = Trace()

    def begin(self, branch: Branch) -> None:
        """Forget the last call."""
        self.branch, self.trace = branch, Trace()
        self.seen = torch.zeros(0, len(self.density.names), dtype=torch.bool)  # (B, M), now
        self.fired = self.seen  # ever
        self.asked = 0  # steps since the first look
        self.velocity: Tensor | None = None
        self.places: Tensor | None = None  # M, (B, M, h, w)

    def end(self) -> None:
        """The call is over.

        Raises:
            RuntimeError: The density was never asked, so that nothing was guarded.
        """
        self.branch = None
        if not self.trace.steps:
            raise RuntimeError("the pipeline never asked its scheduler: its pictures are unguarded")
        if not self.asked:
            raise RuntimeError(
                f"the density was never asked in {len(self.trace.steps)} steps from "
                f"{self.how.start:g} of the denoising on: the pictures are unguarded"
            )

    @torch.no_grad()
    def correction(self, scheduler: Any, output: Tensor, t: Any, x_t: Tensor) -> Tensor | None:
        """Δx̂0 (B, C, h, w), zero for samples that do not fire; None when none does."""
        if self.branch is None:
            raise RuntimeError(
                "a guarded scheduler was used outside of its guarded pipeline, where it guards "
                "nothing; guard the pipeline that is called"
            )
        begun, i = time.perf_counter(), len(self.trace.steps)
        level, progress = prediction.level(scheduler, t), _progress(scheduler, t)
        if i == 0:
            self.seen = self.seen.new_zeros(len(x_t), self.seen.shape[1]).to(x_t.device)
            self.fired = self.seen
            self.branch.samples = len(x_t)
        x0 = level.x0(output.float(), x_t.float())
        score = torch.full((len(x_t),), float("nan"))
        if progress >= self.how.start:
            if self.asked % self.how.every == 0:
                self._look(x0, score)
            self.asked += 1
        γ = self.how.strength * guidance.stage(self.how.schedule, progress, self.how.window)
        text = self.how.direction == "text"
        Δ, corrected = None, (self.fired if text else self.seen).any(1)
        if γ > 0 and corrected.any():
            if text:
                Δ = self._against_text(x0, γ) / level.slope
            else:
                rows, Δ = corrected.nonzero().flatten(), torch.zeros_like(x0)
                Δ[rows] = self._down_gradient(x0, rows, γ, i, level)
        self.trace.steps.append(
            Step(float(t), score.tolist(), corrected.tolist(), time.perf_counter() - begun)
        )
        return Δ

    def _look(self, x0: Tensor, score: Tensor) -> None:
        """Ask the density; what has been seen is seen until p_h < release · η."""
        harm = self.density(self.look(x0))
        η = self.density.thresholds.to(harm.per_concept)
        low = η - (1 - self.how.release) * η.abs()
        self.seen = harm.per_concept >= torch.where(self.seen, low, η)
        self.fired = self.fired | self.seen
        score[:] = harm.score.float().cpu()

    def _against_text(self, x0: Tensor, w: float) -> Tensor:
        """−s (max_h M_h ⊙ (ep − e0) + w Σ_h M_h ⊙ (e_h − e0)) in the prediction, (B, C, h, w).

        The maximum is over all concepts that ever fired, the sum over those that are seen now.
        """
        assert self.branch is not None
        M = self._whereabouts(x0)
        e_p, e_0, s = self.branch.pair()
        rows, concepts = self.seen.nonzero(as_tuple=True)
        e_h = e_0[:0]
        if len(rows):
            e_h = self.branch.under(rows, [self.texts[c] for c in concepts.tolist()])
        prompt, texts = (e_p - e_0).float(), (e_h - e_0[rows]).float()
        Δ, away = guidance.against_text(prompt, texts, M, M[rows, concepts], w, s)
        return Δ.index_add(0, rows, away)

    def _whereabouts(self, x0: Tensor) -> Tensor:
        """M_h, (B, M, h, w), 0 for what never fired; found anew where it is old and h is seen."""
        if not self.how.places:
            everywhere = self.fired[:, :, None, None].expand(*self.fired.shape, *x0.shape[2:])
            return everywhere.to(x0)
        i = len(self.trace.steps)
        if self.places is None:
            self.places = x0.new_zeros(*self.fired.shape, *x0.shape[2:])
            self.found = torch.full_like(self.fired, -self.how.refresh, dtype=torch.long)
        rows, concepts = (self.seen & (i - self.found >= self.how.refresh)).nonzero(as_tuple=True)
        if len(rows):
            M = guidance.whereabouts(self.look(x0[rows]), self.density, concepts, self.how.places)
            self.places[rows, concepts] = F.interpolate(M, x0.shape[2:], mode="area").squeeze(1)
            self.found[rows, concepts] = i
        return self.places

    def _down_gradient(self, x0: Tensor, rows: Tensor, γ: float, i: int, level: Level) -> Tensor:
        how, start = self.how, x0[rows]
        if self.velocity is None:
            self.velocity = torch.zeros_like(x0)
        reference = None
        if how.scale == "normalised":
            assert self.branch is not None
            # In ε, which is what MPGD measures, whatever the network predicts.
            reference = self.branch.guidance_rms(rows) * level.α / (level.σ * abs(level.slope))
        x = start
        for r in range(how.repeats):
            g = guidance.gradient(x, self.density, self.decode, how.copies, seed=1000 * i + 50 * r)
            g = guidance.smooth(g, how.smooth)
            self.velocity[rows] = how.momentum * self.velocity[rows] + (1 - how.momentum) * g
            v = self.velocity[rows]
            step = (
                guidance.published(v, γ)
                if reference is None
                else guidance.normalised(v, γ, reference)
            )
            x = x + step / how.repeats
        return x - start

    @torch.no_grad()
    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """p_h of finished pictures (B, 3, H, W) in [-1, 1], and which reach a threshold."""
        harm = self.density(images)
        return harm.score, harm.exceeds(self.density.thresholds.to(harm.per_concept))


class Guarded:
    """What is laid over a pipeline's class: every call is guarded, or fails.

    Attributes:
        trace: What the guard did in the last call.
    """

    _guard: Guard
    _strict: bool
    _resample: int

    @property
    def trace(self) -> Trace:
        """The steps of the last call, final scores, and what was withheld."""
        return self._guard.trace

    @property
    def thresholds(self) -> list[float]:
        """η of each concept."""
        return [float(η) for η in self._guard.density.thresholds]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own call.

        Raises:
            UserError: The scheduler was exchanged after the guard was put on.
            RuntimeError: Scheduler or density were never asked, so that nothing was guarded.
        """
        done = self._guarded_call(*args, **kwargs)
        return self._withhold(done, args, kwargs) if self._strict else done

    def _guarded_call(self, *args: Any, **kwargs: Any) -> Any:
        guard, scheduler = self._guard, self.scheduler  # type: ignore[attr-defined]
        if not isinstance(scheduler, SafeScheduler) or scheduler.corrector is not guard:
            raise UserError(
                f"got a {type(scheduler).__name__} that was put in after the guard; allowed: the "
                "guarded one; choose the scheduler first, then guard the pipeline"
            )
        call = super().__call__  # type: ignore[misc]
        with Branch(self, arguments(call, args, kwargs).get("clip_skip")) as branch:
            guard.begin(branch)
            try:
                done = call(*args, **kwargs)
            except BaseException:
                guard.branch = None
                raise
        guard.end()
        return done

    def _withhold(self, done: Any, args: Any, kwargs: Any) -> Any:
        """Replace pictures that still show harm, by others if `resample` allows, else by black."""
        images = _images(done)
        device = self._guard.density.thresholds.device
        score, bad = self._guard.judge(to_tensor(images, self).to(device))
        trace = self._guard.trace
        for _ in range(self._resample):
            if not bad.any():
                break
            # Generators have moved on, so that the same call draws other pictures.
            again = _images(self._guarded_call(*args, **kwargs))
            new_score, new_bad = self._guard.judge(to_tensor(again, self).to(device))
            for i in (bad & ~new_bad).nonzero().flatten().tolist():
                images[i], score[i], bad[i] = again[i], new_score[i], False
        for i in bad.nonzero().flatten().tolist():
            images[i] = _black(images[i])
        trace.final, trace.withheld = score.tolist(), bad.tolist()
        self._guard.trace = trace
        if hasattr(done, "nsfw_content_detected"):
            known = done.nsfw_content_detected or [False] * len(bad)
            done.nsfw_content_detected = [a or b for a, b in zip(known, bad.tolist(), strict=True)]
        return done


def guard(
    pipeline: Any,
    density: HarmDensity,
    *,
    decode: Decode | None = None,
    look: Decode | None = None,
    how: Correction | None = None,
    texts: Sequence[str] | None = None,
    strict: bool = False,
    resample: int = 0,
) -> Any:
    """A copy of a pipeline whose pictures are corrected where p_h ≥ η, while they are made.

    The copy shares all weights with the pipeline, which stays unguarded, and is saved as what it
    was. Any diffusers pipeline that samples with a scheduler and a UNet can be guarded.

    Args:
        pipeline: Of diffusers; its scheduler is chosen before.
        density: What must not be seen.
        decode: Latents to pictures, exactly; default: the pipeline's VAE.
        look: The same for the gate; default: the model's distilled decoder, else its VAE.
        how: How x̂0 is corrected.
        texts: A prompt for each concept, for direction `text`; default: the density's own, which
            those of concepts in words have.
        strict: Withhold finished pictures that still reach a threshold.
        resample: With `strict`, how often to draw again before a picture is withheld.

    Raises:
        UserError: The pipeline cannot be guarded, the density cannot see its pictures, or the
            texts do not fit the density.
    """
    from expunge.decoding import Auto, Vae

    if resample and not strict:
        raise UserError("got resample without strict; allowed: both; set strict")
    if not (hasattr(pipeline, "scheduler") and hasattr(pipeline, "unet")):
        raise UserError(
            f"got a {type(pipeline).__name__}; allowed: a diffusers pipeline with a scheduler and "
            "a UNet"
        )
    require_sight(density, pipeline)
    decode = decode or Vae().build(pipeline)
    worker = Guard(
        density,
        decode,
        look or Auto().build(pipeline),
        how or Correction(),
        (density.texts or ()) if texts is None else texts,
    )
    guarded: Any = graft(pipeline, Guarded)
    guarded.scheduler = safe_scheduler(pipeline.scheduler, worker)
    guarded._guard, guarded._strict, guarded._resample = worker, strict, resample
    return guarded


def require_sight(density: HarmDensity, pipeline: Any) -> None:
    """Refuse the bundled guide for a model that draws other pictures than icons.

    Raises:
        UserError: So it is; it would see nothing, and all would be let through.
    """
    from expunge.clip import load_clip
    from expunge.decoding.base import vae_factor

    side = pipeline.unet.config.sample_size
    side = min(side if isinstance(side, (list, tuple)) else [side]) * vae_factor(pipeline.vae)
    if side > LARGEST_ICON and load_clip("emoji").eye in json.dumps(density.identity()):
        raise UserError(
            f"got the emoji guide, which knows icons of 64 pixels, for a model of {side}; allowed: "
            "a CLIP of such pictures; say clip ViT-B-16/openai (--sampler.density.clip)"
        )


def to_tensor(images: Any, pipeline: Any) -> Tensor:
    """What a pipeline gives (PIL, NumPy or a tensor in [0, 1]) as (B, 3, H, W) in [-1, 1]."""
    found: Tensor = pipeline.image_processor.preprocess(images)
    return found.float()


def _images(done: Any) -> Any:
    images = done[0] if isinstance(done, tuple) else done.images
    if isinstance(images, Tensor) and images.shape[1] != 3:
        raise UserError(
            "got output_type latent from a strict guard, which must see the pictures; allowed: "
            "pil, np, pt"
        )
    return images


def _black(image: Any) -> Any:
    from PIL import Image

    if isinstance(image, Image.Image):
        return Image.new(image.mode, image.size)
    return image * 0


def _progress(scheduler: Any, t: Any) -> float:
    """Share of the denoising that lies before timestep t; image-to-image starts in the middle."""
    place = (scheduler.timesteps == t).nonzero()
    return int(place[0]) / len(scheduler.timesteps)
