"""Harm densities p_h(x), one file per kind, and their table."""

from expunge.registry import Entry, Registry

DENSITIES = Registry(
    "density",
    {
        "clip_text": Entry(
            "expunge.densities.clip_text:ClipText", "cosine between CLIP's picture and CLIP's text"
        ),
        "clip_images": Entry(
            "expunge.densities.clip_images:ClipImages",
            "likeness to a folder of example pictures, in CLIP",
        ),
        "sd_filter": Entry(
            "expunge.densities.sd_filter:SdFilter",
            "Stable Diffusion's safety checker: its concepts and their thresholds",
        ),
        "clip_head": Entry(
            "expunge.densities.clip_head:ClipHead",
            "a classifier on CLIP features: a trained head, or Q16's prompt vectors",
        ),
        "calibrated": Entry(
            "expunge.densities.calibrated:Calibrated",
            "another density as its percentile among harmless pictures",
        ),
        "combination": Entry(
            "expunge.densities.combination:Combination",
            "several densities; fires when one of them does",
        ),
        "callable": Entry(
            "expunge.densities.from_callable:FromCallable", "a Python function of pictures"
        ),
    },
)
