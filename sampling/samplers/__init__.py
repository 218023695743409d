"""The table of samplers: settings that `wrap` a pipeline, one file each."""

from expunge.registry import Entry, Registry

SAMPLERS = Registry(
    "sampler",
    {
        "plain": Entry("expunge.sampling.samplers.plain:Plain", "the pipeline as it is"),
        "safe": Entry(
            "expunge.sampling.samplers.safe:Safe",
            "x̂0 corrected where a harm density fires, and nowhere else",
        ),
        "published": Entry(
            "expunge.sampling.samplers.safe:Published",
            "the safe sampler as published, with its constants (arXiv 2505.08817)",
        ),
        "negative_prompt": Entry(
            "expunge.sampling.samplers.negative_prompt:NegativePrompt",
            "the concept as a negative prompt, in its place or with a weight of its own",
        ),
        "sld": Entry(
            "expunge.sampling.samplers.sld:Sld",
            "safe latent diffusion: away from the concept's text, 4 presets (arXiv 2211.05105)",
        ),
        "safree": Entry(
            "expunge.sampling.samplers.safree:Safree",
            "prompts without the concept's subspace, its text side (arXiv 2410.12761)",
        ),
        "classifier": Entry(
            "expunge.sampling.samplers.classifier:Classifier",
            "classifier guidance away from a harm density, through the UNet (arXiv 2105.05233)",
        ),
    },
)
