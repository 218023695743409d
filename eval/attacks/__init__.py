"""Attacks: what an adversary tries so that an erased concept is drawn after all."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from expunge.registry import Entry, Registry

if TYPE_CHECKING:
    from expunge.eval.attacks.arena import Arena

ATTACKS = Registry(
    "attack",
    {
        "concept_inversion": Entry(
            "expunge.eval.attacks.concept_inversion:ConceptInversion",
            "white box: a soft token learnt from pictures of the concept (arXiv 2308.01508)",
        ),
        "unlearndiffatk": Entry(
            "expunge.eval.attacks.unlearndiffatk:UnlearnDiffAtk",
            "white box: an adversarial prefix, by gradients of the denoising loss "
            "(arXiv 2310.11868)",
        ),
        "p4d": Entry(
            "expunge.eval.attacks.p4d:Prompting4Debugging",
            "white box: a prompt under which it predicts what the base does (arXiv 2309.06135)",
        ),
        "ring_a_bell": Entry(
            "expunge.eval.attacks.ring_a_bell:RingABell",
            "black box: genetic search for a prompt that reads like more of the concept "
            "(arXiv 2310.10012)",
        ),
        "paraphrase": Entry(
            "expunge.eval.attacks.paraphrase:Paraphrase",
            "black box: typos, spacing, doubled words, other sentences, other words",
        ),
        "latent_inversion": Entry(
            "expunge.eval.attacks.latent_inversion:LatentInversion",
            "white box: start from the noise that pictures of the concept come from "
            "(arXiv 2412.00782)",
        ),
        "relearning": Entry(
            "expunge.eval.attacks.relearning:Relearning",
            "white box: train on a few pictures until the concept is back (arXiv 2505.16174)",
        ),
    },
)


class Attack(Protocol):
    """The frozen settings of an attack; all of its budget is in them."""

    access: Literal["white box", "black box"]
    """Whether it needs the erased model's weights, or only its pictures."""
    together: bool
    """Whether it takes all cases at once, those too that succeed without it."""

    def prepare(self, arena: "Arena") -> None:
        """Whatever is done once for all cases, counted as their common cost."""

    def run(self, arena: "Arena", cases: Sequence[int]) -> None:
        """Attack these cases by `arena.attempt`; what it depends on is they and the seed."""

    def findings(self, arena: "Arena", rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What there is to say besides the rates; may be empty."""
