"""W' = argmin Σ a ‖W' c − W g‖² + Σ b ‖W' p − W p‖² + λ ‖W' − W‖², for every W at once.

W are the keys and values of all cross-attention layers, which read the same embeddings: c of what
is erased, g of what takes its place, p of what must stay (arXiv 2308.14761, equation 7). With
E = Σ a (g − c) cᵀ and M = λ I + Σ a c cᵀ + Σ b p pᵀ the solution is W' = W (I + E M⁻¹): one change
of the embeddings' space, the same for all layers, of rank at most the number of c.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.errors import UserError
from expunge.low_rank import nearest


class Fitter:
    """Accumulates embeddings; order does not matter. All in float64, which MPS lacks: on the CPU.

    Args:
        width: D, of the embeddings.
        λ: How strongly W' is held to W, above 0.

    Attributes:
        erased: All c, (N, D) at a time.
        wanted: Their g.
        weights: Their a, (N, 1).
    """

    def __init__(self, width: int, λ: float) -> None:
        self.M = λ * torch.eye(width, dtype=torch.float64)
        self.erased: list[Tensor] = []
        self.wanted: list[Tensor] = []
        self.weights: list[Tensor] = []

    def erase(self, c: Tensor, g: Tensor, a: Tensor | float = 1.0) -> None:
        """W' c = W g is wanted, c and g (N, D), with weight a, (N, 1) or one for all."""
        c = self._weigh(c, a)
        self.erased.append(c)
        self.wanted.append(g.cpu().double())
        self.weights.append(torch.as_tensor(a, dtype=c.dtype).cpu().expand(len(c), 1))

    def preserve(self, p: Tensor, b: Tensor | float = 1.0) -> None:
        """W' p = W p is wanted, p (N, D), with weight b, (N, 1) or one for all."""
        self._weigh(p, b)

    def _weigh(self, x: Tensor, weight: Tensor | float) -> Tensor:
        """M with weight · x xᵀ more; x as it is computed with."""
        x = x.cpu().double()
        self.M += (weight * x).T @ x
        return x

    def solve(self) -> Edit:
        """The frozen edit."""
        if not self.erased:
            raise ValueError("got nothing to erase")
        c, g, a = (torch.cat(parts) for parts in (self.erased, self.wanted, self.weights))
        return Edit((a * (g - c)).T.contiguous(), torch.linalg.solve(self.M, c.T).T.contiguous())


@dataclass(frozen=True)
class Edit:
    """T = P Q of W' = W (I + T).

    Attributes:
        P: (D, N).
        Q: (N, D).
    """

    P: Tensor
    Q: Tensor

    @property
    def T(self) -> Tensor:
        """(D, D)."""
        return self.P @ self.Q

    def delta(self, W: Tensor) -> Tensor:
        """ΔW = W T, (O, D)."""
        return W.cpu().double() @ self.P @ self.Q

    def lora(self, W: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
        """B (O, rank), A (rank, D) with B A nearest to ΔW, and ‖ΔW − B A‖ / ‖ΔW‖."""
        return nearest(W.cpu().double() @ self.P, self.Q, rank)

    def save(self, file: Path) -> None:
        """As safetensors, exactly."""
        from safetensors.torch import save_file

        save_file({"P": self.P, "Q": self.Q}, file)

    @staticmethod
    def load(file: Path) -> Edit:
        """What `save` wrote.

        Raises:
            UserError: It is something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(file)
            return Edit(found["P"], found["Q"])
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"got edit {file}; allowed: a file that a closed-form erasure wrote; {error!r}"
            ) from None


def embeddings(pipeline: Any, prompt: str, end: int, tokens: str) -> tuple[Tensor, Tensor]:
    """What cross-attention reads of a phrase in a prompt, (N, D), and how each counts, (N, 1).

    Args:
        pipeline: Whose text encoder it is.
        prompt: The whole text.
        end: Of the phrase in it, in characters; where nothing stands before, the token that begins
            every text takes its place.
        tokens: `last`, the phrase's last token, as published; `rest`, that and all behind it up to
            the end of the sequence, which a causal text encoder has seen the phrase in. All the
            padding behind a text counts as one token: it is most of the sequence, and alike.

    Raises:
        UserError: The prompt does not fit into the text encoder.
    """
    from expunge.backbones import encode_prompts
    from expunge.soft_tokens import token_ids

    # Less the token that begins and the one that ends; of nothing the one that begins is left.
    last = len(token_ids(pipeline, prompt[:end].rstrip())) - 2
    (states,) = encode_prompts(pipeline, [prompt])
    if last >= len(states) - 1:
        raise UserError(
            f"got prompt {prompt!r}, longer than the {len(states)} tokens that the text encoder "
            "reads; allowed: a shorter one"
        )
    counts = torch.ones(len(states), 1, dtype=torch.float64)
    padding = counts[len(token_ids(pipeline, prompt)) :]
    padding /= max(len(padding), 1)
    read = slice(last, last + 1 if tokens == "last" else None)
    return states[read], counts[read]
