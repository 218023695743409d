"""One more branch of a pipeline's UNet: what it predicts for another text at the same x_t."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from expunge import guidance


class Branch:
    """Remembers the UNet's last call in a pipeline, and repeats it under other texts.

    Everything else of the call stays as it was (timestep, the picture to inpaint, ControlNet's
    residuals, SDXL's sizes), so that any pipeline with a UNet has a further branch without its
    knowledge. Used as a context: outside of it the UNet is untouched.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._texts: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._call: tuple[tuple[Any, ...], dict[str, Any], Tensor] | None = None

    def __enter__(self) -> Branch:
        self._handle = self.pipeline.unet.register_forward_hook(self._remember, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self._call = None

    def predict(self, rows: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor, float]:
        """(e_h, e_0, s) of some samples, each (R, C, h, w): under these texts and under none.

        Args:
            rows: Which samples, (R,).
            texts: A text for each of them.

        Returns:
            s is the guidance scale; 1 when the pipeline samples without guidance.
        """
        args, kwargs, output = self._last()
        if self._guided:
            half = len(output) // 2
            e_0, s = output[:half][rows], float(self.pipeline.guidance_scale)
            return self._again(args, kwargs, rows + half, texts), e_0, s
        both = self._again(args, kwargs, torch.cat([rows, rows]), [*texts, *[""] * len(texts)])
        e_h, e_0 = both.chunk(2)
        return e_h, e_0, 1.0

    def guidance_rms(self, rows: Tensor) -> Tensor:
        """s · RMS(ep − e0) of some samples, (R,); without guidance RMS of the prediction."""
        _, _, output = self._last()
        if not self._guided:
            return guidance.rms(output[rows])
        e_0, e_p = output.chunk(2)
        return float(self.pipeline.guidance_scale) * guidance.rms((e_p - e_0)[rows])

    @property
    def _guided(self) -> bool:
        return bool(getattr(self.pipeline, "do_classifier_free_guidance", False))

    def _remember(self, unet: Any, args: Any, kwargs: Any, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output.sample
        self._call = (args, kwargs, found)

    def _last(self) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
        if self._call is None:
            raise RuntimeError("the pipeline asked its scheduler before its UNet")
        return self._call

    def _again(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor, texts: Sequence[str]
    ) -> Tensor:
        total = len(args[0] if args else kwargs["sample"])
        pick = lambda v: v[rows.to(v.device)] if v.ndim and len(v) == total else v  # noqa: E731
        args, kwargs = _each(args, pick), _each(kwargs, pick)
        encoded = [self._encode(text) for text in texts]
        states = torch.stack([embedding for embedding, _ in encoded])
        if len(args) > 2:
            args = (*args[:2], states.to(args[2]), *args[3:])
        else:
            kwargs["encoder_hidden_states"] = states.to(kwargs["encoder_hidden_states"])
        added = kwargs.get("added_cond_kwargs")
        if added and "text_embeds" in added:
            pooled = torch.stack([p for _, p in encoded if p is not None])
            kwargs["added_cond_kwargs"] = {**added, "text_embeds": pooled.to(added["text_embeds"])}
        # The bare forward: its own hooks would take this call for the pipeline's.
        output = self.pipeline.unet.forward(*args, **kwargs)
        found: Tensor = output[0] if isinstance(output, tuple) else output.sample
        return found

    def _encode(self, text: str) -> tuple[Tensor, Tensor | None]:
        """Embedding (T, D) and, for SDXL, pooled embedding (D',) of a text, each made once."""
        if text not in self._texts:
            found = self.pipeline.encode_prompt(
                text, device=self.pipeline._execution_device, num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )  # fmt: skip
            pooled = found[2][0] if len(found) > 2 else None
            self._texts[text] = (found[0][0], pooled)
        return self._texts[text]


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Tensors in nested dicts, lists and tuples, changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each(inner, change) for inner in value)
    return value
