"""Libraries that warn of what is checked here, told to be quiet for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet(logging: Any) -> Iterator[None]:
    """Errors only from `diffusers.utils.logging` or `transformers.utils.logging`."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
