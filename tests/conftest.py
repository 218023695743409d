"""What holds for every test: no network, a fixed number of threads, markers that say why."""

import os

# Before any test module can import a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {}
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            reasons["gpu"] = "needs a CUDA device"
    if os.environ.get("EXPUNGE_NETWORK") != "1":
        reasons["network"] = "needs the internet: set EXPUNGE_NETWORK=1"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
