"""Exports that load elsewhere: LoRA files and merged weights, read back before they are kept."""
