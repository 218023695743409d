"""One more branch of a pipeline's UNet: what it predicts for another text at the same x_t."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expunge import guidance
from expunge.sampling.denoiser_hook import Text, encode, named, pick, with_texts


class Branch:
    """Remembers the UNet's last call in a pipeline, and repeats it under other texts.

    Everything else of the call stays as it was (timestep, the picture to inpaint, ControlNet's
    residuals, SDXL's sizes), so that any pipeline with a UNet has a further branch without its
    knowledge, with guidance or without. Used as a context: outside of it the UNet is untouched.

    Args:
        pipeline: Of diffusers.
        clip_skip: Of the call: further texts are encoded as its prompt is.
    """

    def __init__(self, pipeline: Any, clip_skip: int | None = None) -> None:
        self.pipeline, self.clip_skip = pipeline, clip_skip
        self._texts: dict[str, Text] = {}
        self._call: tuple[Tensor, Any, dict[str, Any], Tensor] | None = None
        self.samples = 0

    def __enter__(self) -> Branch:
        # The UNet is shared with the unguarded original, which another thread may be using.
        self._thread = threading.get_ident()
        self._handle = self.pipeline.unet.register_forward_hook(self._remember, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self._call = None

    def pair(self) -> tuple[Tensor, Tensor, float]:
        """(e_p, e_0, s): under the prompt and under none, (B, C, h, w), and the guidance scale.

        A pipeline that samples without guidance has s = 1, and its e_0 is predicted for this.
        """
        output = self._last()[3]
        if self._guided:
            half = self._half(output)
            return output[half:], output[:half], self._scale
        every = torch.arange(len(output), device=output.device)
        return output, self._again(every, [""] * len(output)), 1.0

    def under(self, rows: Tensor, texts: Sequence[str]) -> Tensor:
        """e_h (R, C, h, w) of some samples, under a text for each of them.

        Args:
            rows: Which samples, (R,).
            texts: R of them.
        """
        output = self._last()[3]
        return self._again(rows + (self._half(output) if self._guided else 0), texts)

    def guidance_rms(self, rows: Tensor) -> Tensor:
        """How strong guidance is in the prediction: s · RMS(ep − e0), (R,); without it its RMS."""
        output = self._last()[3]
        if not self._guided:
            return guidance.rms(output[rows])
        half = self._half(output)
        return self._scale * guidance.rms((output[half:] - output[:half])[rows])

    def _half(self, output: Tensor) -> int:
        if len(output) != 2 * self.samples:
            raise RuntimeError(
                f"the UNet was called with {len(output)} samples for {self.samples} pictures; a "
                "guard knows pairs, without the prompt and with it"
            )
        return self.samples

    @property
    def _guided(self) -> bool:
        return bool(getattr(self.pipeline, "do_classifier_free_guidance", False))

    @property
    def _scale(self) -> float:
        return float(self.pipeline.guidance_scale)

    def _remember(self, unet: Any, args: Any, kwargs: Any, output: Any) -> None:
        if threading.get_ident() == self._thread:
            (sample, t), kwargs = named(args, kwargs)
            self._call = (sample, t, kwargs, output[0])

    def _last(self) -> tuple[Tensor, Any, dict[str, Any], Tensor]:
        if self._call is None:
            raise RuntimeError("the pipeline asked its scheduler before its UNet")
        return self._call

    def _again(self, rows: Tensor, texts: Sequence[str]) -> Tensor:
        sample, t, kwargs, _ = self._last()
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                self._texts[text] = encode(self.pipeline, text, self.clip_skip)
        sample, t, kwargs = pick((sample, t, kwargs), len(sample), rows)
        kwargs = with_texts(kwargs, [self._texts[text] for text in texts])
        # The bare forward: its hooks would take this call for the pipeline's.
        found: Tensor = self.pipeline.unet.forward(sample, t, **kwargs)[0]
        return found
