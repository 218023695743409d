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
        "ablation": Entry(
            "expunge.train.objectives.ablation:Ablation",
            "concept ablation: onto an anchor, on its pictures (arXiv 2303.13516)",
        ),
        "slider": Entry(
            "expunge.train.objectives.slider:Slider",
            "concept slider: from one prompt towards another (arXiv 2311.12092)",
        ),
        "spm": Entry(
            "expunge.train.objectives.spm:Spm",
            "semi-permeable membrane: ESD, held fast elsewhere (arXiv 2312.16145)",
        ),
        "hfi": Entry(
            "expunge.train.objectives.hfi:Hfi",
            "human feedback inversion: SDD of a soft token from feedback (arXiv 2407.21032)",
        ),
        "density": Entry(
            "expunge.train.objectives.density:Density",
            "what the guard would do, learnt: erases where p_h sees the concept (ours)",
        ),
        "twin": Entry(
            "expunge.train.objectives.twin:Twin",
            "pictures of the concept become their harmless twins, whatever is said (ours)",
        ),
        "uce": Entry(
            "expunge.train.objectives.uce:Uce",
            "unified concept editing: keys and values in closed form (arXiv 2308.14761)",
        ),
        "rece": Entry(
            "expunge.train.objectives.rece:Rece",
            "UCE and its adversarial embeddings, in closed form (arXiv 2407.12383)",
        ),
    },
)
