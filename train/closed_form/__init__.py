"""Erasure without training: one linear equation, solved in seconds."""
