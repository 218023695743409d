"""Remove concepts from text-to-image diffusion models, and prove that they are gone."""

__version__ = "0.1.0"
