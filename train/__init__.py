"""Erase concepts from the weights of a diffusion model."""
