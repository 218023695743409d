"""Erase concepts from the weights of a diffusion model."""

from expunge.registry import Entry, Registry

LATENTS = Registry(
    "latents policy",
    {
        "rollout": Entry(
            "expunge.train.latents:Rollout", "denoise partially at every step, as published"
        ),
        "replay": Entry(
            "expunge.train.latents:Replay", "learn from all x_t of a denoising, many times"
        ),
        "noised": Entry(
            "expunge.train.noised:Noised",
            "pictures with noise on them, which is known",
        ),
    },
)

# Named, not imported: training knows of a probe only that it can be opened and asked.
PROBES = Registry(
    "probe",
    {"suite": Entry("expunge.eval.probe:Probe", "pictures of an evaluation suite, judged")},
)
