from typing import Any

import pytest

from expunge import backbones


@pytest.fixture
def pipeline(tiny_sd1: str) -> Any:
    return backbones.load_pipeline(tiny_sd1)
