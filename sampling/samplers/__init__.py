"""The table of samplers: each is `wrap(pipeline) -> pipeline`."""

from expunge.registry import Entry, Registry

SAMPLERS = Registry(
    "sampler",
    {
        "plain": Entry("expunge.sampling.samplers.plain:wrap", "the pipeline as it is"),
    },
)
