"""Attacks: what an adversary tries so that an erased concept is drawn after all."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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


class Attack:
    """The settings of an attack, a frozen dataclass; all of its budget is in them."""

    access: ClassVar[Literal["white box", "black box"]]
    """Whether it needs the erased model's weights, or only its pictures."""
    together: ClassVar[bool] = False
    """Whether it takes all cases at once, those too that succeed without it."""
    one_concept: ClassVar[bool] = False
    """Whether it learns of one concept, the first that is named, whatever a case is about."""

    def prepare(self, arena: "Arena") -> None:
        """Whatever is done once for all cases, counted as their common cost; nothing by default.

        Raises:
            UserError: It cannot be done to this model.
        """

    def run(self, arena: "Arena", cases: Sequence[int]) -> None:
        """Attack these cases by `arena.attempt`; what it does depends on them and the seed."""
        raise NotImplementedError

    def findings(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the rows say besides the rates; nothing by default."""
        return {}
