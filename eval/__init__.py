"""Measure what was erased, what was kept and at what cost."""
