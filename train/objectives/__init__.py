"""Erasure objectives, one file per method."""
