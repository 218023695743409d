"""Further guidance in an unmodified diffusers pipeline: a hook on its UNet.

Under classifier-free guidance a pipeline calls its UNet with pairs, first all samples without the
prompt and then all with it, and computes e0 + s (ep − e0) itself. The hook sees e0 and ep, may run
the UNet once more under another text or with gradient, and returns an ep' for which the pipeline's
own formula gives the ε that is wanted. So text-to-image, image-to-image, inpainting and ControlNet
pipelines of SD 1.x, SD 2.x and SDXL are guided alike, whatever their scheduler.

Steps are counted as the scheduler counts them: a scheduler of order 2 (Heun, KDPM2) calls the UNet
twice in a step; every call of PNDM's counts as one, as it does for diffusers' callbacks (with
Stable Diffusion's settings there is one more of them than steps); image-to-image counts from the
step at which it starts.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge import prediction
from expunge.errors import UserError
from expunge.sampling.graft import graft
from expunge.sampling.text_guidance import conditional_half
from expunge.soft_tokens import token_ids

_TINY = 1e-6


@dataclass(frozen=True)
class Text:
    """A text as a UNet reads it.

    Attributes:
        states: (1, T, D).
        pooled: (1, D'), of SDXL's second encoder; None for other models.
    """

    states: Tensor
    pooled: Tensor | None


@torch.no_grad()
def encode(pipeline: Any, text: str, clip_skip: int | None = None) -> Text:
    """A text as the pipeline itself encodes it.

    Raises:
        UserError: It is longer than what the encoder reads: the rest would not be guarded against.
    """
    tokens = len(token_ids(pipeline, text))
    if tokens > pipeline.tokenizer.model_max_length:
        raise UserError(
            f"got a concept of {tokens} tokens; allowed: {pipeline.tokenizer.model_max_length}, "
            "all its targets together; name fewer or shorter ones"
        )
    found = pipeline.encode_prompt(
        text,
        device=pipeline._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=clip_skip,
    )
    return Text(found[0], found[2] if len(found) > 2 else None)


@dataclass(frozen=True)
class Denoising:
    """One call of the UNet by a pipeline, of B samples under classifier-free guidance.

    Attributes:
        e0: ε without the prompt, (B, C, h, w), in float32 whatever the UNet computes in.
        ep: ε with the prompt, (B, C, h, w).
        s: Scale of the guidance.
        step: Index of the denoising step, from 0.
        steps: How many there are.
        forward: The UNet's own, past all hooks.
        sample: Its input, (2B, C', h, w); C' > C for models that inpaint.
        t: Its timestep.
        kwargs: What else it was given.
        kind: What it predicts: `epsilon`, `v_prediction` or `sample`.
        scheduler: The pipeline's.
    """

    e0: Tensor
    ep: Tensor
    s: float
    step: int
    steps: int
    forward: Callable[..., Any]
    sample: Tensor
    t: Any
    kwargs: Mapping[str, Any]
    kind: str
    scheduler: Any

    @property
    def x_t(self) -> Tensor:
        """The noisy latents (B, C, h, w), of unit variance: √ᾱ x_0 + √(1−ᾱ) ε."""
        B, C = self.e0.shape[:2]
        return self.sample[B:, :C].float()

    @property
    def ᾱ(self) -> Tensor:
        """ᾱ_t of every sample, (B,)."""
        return _alpha_bar(self.scheduler, self.t, self.e0)

    @property
    def plain(self) -> Tensor:
        """What the pipeline would do: e0 + s (ep − e0)."""
        return prediction.guide(self.e0, self.ep, self.s)

    def branch(self, text: Text) -> Tensor:
        """ε of all samples under another text, (B, C, h, w); the rest as for the conditional half.

        The rest is SDXL's sizes, ControlNet's residuals, IP-Adapter's pictures.
        """
        B = len(self.e0)
        return self._predict(torch.arange(B, 2 * B, device=self.sample.device), None, text)

    def pair(self, x_t: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """e0 and ep of some samples at other latents: differentiable, where gradients are on.

        Args:
            x_t: (R, C, h, w).
            rows: Which samples, (R,).
        """
        e = self._predict(torch.cat([rows, rows + len(self.e0)]), torch.cat([x_t, x_t]), None)
        e0, ep = e.chunk(2)
        return e0, ep

    def _predict(self, rows: Tensor, x_t: Tensor | None, text: Text | None) -> Tensor:
        total, C = len(self.sample), self.e0.shape[1]
        sample, t, kwargs = pick((self.sample, self.t, dict(self.kwargs)), total, rows)
        if x_t is not None:
            sample = torch.cat([x_t.to(sample.dtype), sample[:, C:]], dim=1)
        if text is not None:
            kwargs = with_texts(kwargs, [text] * len(rows))
        output = self.forward(sample, t, **kwargs)[0].float()
        ᾱ = _alpha_bar(self.scheduler, self.t, output) if self.kind != "epsilon" else None
        return _epsilon(output, sample[:, :C].float(), ᾱ, self.kind)


@dataclass(frozen=True)
class Guidance:
    """What a sampler does in one call of a pipeline; made anew for each, so that no state stays.

    Attributes:
        embeddings: (step, states (2B, T, D)) -> states: what the UNet reads instead.
        pooled: (2B, D') -> the same: what it reads of SDXL's pooled embeddings instead.
        guided: The ε (B, C, h, w) that is wanted of a step; None for what the pipeline does.
    """

    embeddings: Callable[[int, Tensor], Tensor] | None = None
    pooled: Callable[[Tensor], Tensor] | None = None
    guided: Callable[[Denoising], Tensor | None] | None = None


def guide_denoiser(pipeline: Any, start: Callable[[Any, Mapping[str, Any]], Guidance]) -> Any:
    """A copy of a pipeline with further guidance; the pipeline itself stays as it is.

    The copy shares all weights, is saved by `save_pretrained` as what it was, and may be guided
    once more. While it runs, a hook is on the UNet; it acts in the calling thread alone, and is
    removed at the end, however that comes.

    Args:
        pipeline: Of diffusers, with a UNet.
        start: Given the pipeline and the arguments of a call, by name: what to do in it.

    Raises:
        UserError: The pipeline has no UNet; or, when called, it does not guide, or never called
            its UNet.
    """
    if not isinstance(getattr(pipeline, "unet", None), torch.nn.Module):
        raise UserError(
            f"got a {type(pipeline).__name__}, which has no UNet; allowed: pipelines of SD 1.x, "
            "SD 2.x and SDXL"
        )
    inner = type(pipeline).__call__

    class Guided:
        @functools.wraps(inner)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            call = super().__call__  # type: ignore[misc]
            hook = _Hook(self, start(self, arguments(call, args, kwargs)))
            with hook:
                done = call(*args, **kwargs)
            if not hook.calls:
                raise UserError(
                    f"got a {type(self).__name__} that never called its UNet, so that its "
                    "pictures are unguarded; allowed: one that does; raise the number of steps"
                )
            return done

    return graft(pipeline, Guided)


class _Hook:
    """The hook of one call."""

    def __init__(self, pipeline: Any, guidance: Guidance) -> None:
        self.pipeline, self.guidance = pipeline, guidance
        self.calls = 0
        # The UNet is shared with the unguarded original, which another thread may be using.
        self.thread = threading.get_ident()

    def __enter__(self) -> None:
        unet = self.pipeline.unet
        self.handles = [
            unet.register_forward_pre_hook(self.before, with_kwargs=True),
            unet.register_forward_hook(self.after, with_kwargs=True),
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def step(self) -> int:
        return self.calls // self.order

    @property
    def order(self) -> int:
        return int(getattr(self.pipeline.scheduler, "order", 1))

    def before(
        self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if threading.get_ident() != self.thread:
            return None
        args, kwargs = named(args, kwargs)
        self._refuse_unpaired(args[0], kwargs)
        if self.guidance.embeddings is not None:
            states = self.guidance.embeddings(self.step, kwargs["encoder_hidden_states"])
            kwargs["encoder_hidden_states"] = states
        added = kwargs.get("added_cond_kwargs") or {}
        if self.guidance.pooled is not None and "text_embeds" in added:
            pooled = self.guidance.pooled(added["text_embeds"])
            kwargs["added_cond_kwargs"] = {**added, "text_embeds": pooled}
        return args, kwargs

    def after(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if threading.get_ident() != self.thread:
            return None
        step, self.calls = self.step, self.calls + 1
        if self.guidance.guided is None:
            return None
        scheduler, found = self.pipeline.scheduler, output[0]
        (sample, t), B = args, len(found) // 2
        kind = prediction.prediction_type(scheduler)
        ᾱ = _alpha_bar(scheduler, t, found) if kind != "epsilon" else None
        e = _epsilon(found.float(), sample[:, : found.shape[1]].float(), ᾱ, kind)
        call = Denoising(
            e0=e[:B],
            ep=e[B:],
            s=float(self.pipeline.guidance_scale),
            step=step,
            steps=math.ceil(self.pipeline.num_timesteps / self.order),
            forward=unet.forward,
            sample=sample,
            t=t,
            kwargs=kwargs,
            kind=kind,
            scheduler=scheduler,
        )
        wanted = self.guidance.guided(call)
        if wanted is None:
            return None
        change = conditional_half(call.e0, call.ep, wanted, call.s) - call.ep
        if ᾱ is not None:
            change = change * _slope(ᾱ[:B], kind)
        adjusted = torch.cat([found[:B], (found[B:].float() + change).to(found.dtype)])
        return (adjusted,) if isinstance(output, tuple) else type(output)(sample=adjusted)

    def _refuse_unpaired(self, sample: Tensor, kwargs: Mapping[str, Any]) -> None:
        if not getattr(self.pipeline, "do_classifier_free_guidance", False):
            s = getattr(self.pipeline, "guidance_scale", "none")
            raise UserError(
                f"got guidance_scale {s}; allowed: above 1, for the sampler works through "
                "classifier-free guidance; raise it"
            )
        states, B = kwargs.get("encoder_hidden_states"), len(sample) // 2
        paired = isinstance(states, Tensor) and len(states) == len(sample) == 2 * B
        # Comparing costs a synchronisation with the device: once a call is enough.
        if not paired or (self.calls == 0 and not torch.equal(sample[:B], sample[B:])):
            raise UserError(
                f"got a {type(self.pipeline).__name__}, whose UNet does not see each sample once "
                "without and once with the prompt; allowed: text-to-image, image-to-image, "
                "inpainting and ControlNet pipelines of SD 1.x, SD 2.x and SDXL"
            )


def arguments(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What a pipeline is called with, by name."""
    bound = dict(inspect.signature(call).bind(*args, **kwargs).arguments)
    rest: dict[str, Any] = bound.pop("kwargs", {})
    return bound | rest


def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Sample and timestep by place, the rest by name, however the UNet was called."""
    names = ("sample", "timestep", "encoder_hidden_states")
    given = dict(zip(names, args, strict=False)) | kwargs
    return (given.pop("sample"), given.pop("timestep")), given


def pick(value: Any, total: int, rows: Tensor) -> Any:
    """Rows of every tensor whose first dimension is the batch, in nested containers."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and len(value) == total else value
    if isinstance(value, dict):
        return {key: pick(inner, total, rows) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(pick(inner, total, rows) for inner in value)
    return value


def with_texts(kwargs: dict[str, Any], texts: Sequence[Text]) -> dict[str, Any]:
    """A UNet's named arguments under other texts, one for each sample."""
    states = torch.cat([text.states for text in texts])
    changed = kwargs | {"encoder_hidden_states": states.to(kwargs["encoder_hidden_states"])}
    added = kwargs.get("added_cond_kwargs") or {}
    pooled = [text.pooled for text in texts if text.pooled is not None]
    if pooled and "text_embeds" in added:
        embeds = torch.cat(pooled).to(added["text_embeds"])
        changed["added_cond_kwargs"] = {**added, "text_embeds": embeds}
    return changed


def _alpha_bar(scheduler: Any, t: Any, like: Tensor) -> Tensor:
    # The UNet's input is scaled to unit variance, whatever the scheduler's own latents are.
    level = prediction.level(scheduler, t)
    ᾱ = level.α**2 / (level.α**2 + level.σ**2)
    return torch.full((len(like),), ᾱ, device=like.device)


def _epsilon(found: Tensor, x_t: Tensor, ᾱ: Tensor | None, kind: str) -> Tensor:
    return found if ᾱ is None else prediction.to_epsilon(found, x_t, ᾱ, kind)


def _slope(ᾱ: Tensor, kind: str) -> Tensor:
    """∂ prediction / ∂ε at fixed x_t: 1/√ᾱ for v, −√(1−ᾱ)/√ᾱ for x_0."""
    ᾱ = ᾱ.view(-1, 1, 1, 1)
    # Where ᾱ = 0 all texts give one and the same ε, and the change is zero.
    slope = 1 / ᾱ.sqrt().clamp(min=_TINY)
    return slope if kind == "v_prediction" else -(1 - ᾱ).sqrt() * slope
