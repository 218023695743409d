"""What holds for every test of training."""

import pytest


@pytest.fixture(autouse=True)
def _one_accelerator_at_a_time():
    """Accelerate keeps its state in a singleton; every run in one process starts afresh."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
