"""Erasure objectives, one file per method, and their table."""

from expunge.registry import Entry, Registry

OBJECTIVES = Registry(
    "objective",
    {
        "esd": Entry(
            "expunge.train.objectives.esd:Esd",
            "erased stable diffusion: away from the concept (arXiv 2303.07345)",
        ),
        "sdd": Entry(
            "expunge.train.objectives.sdd:Sdd",
            "safe self-distillation: onto the empty prompt, EMA teacher (arXiv 2307.05977)",
        ),
    },
)
