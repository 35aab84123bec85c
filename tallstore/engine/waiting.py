"""Waiting for others to be done with a store: not silently, and not for ever."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Final

__all__ = ["attempts"]

_POLL: Final = 0.05  # seconds between two attempts
_PATIENCE: Final = 1.0  # seconds before anything is said
_LOG: Final = logging.getLogger("tallstore")


def attempts(timeout: float, telling: Callable[[], str]) -> Iterator[None]:
    """Come back for one attempt after the other, the first at once, until `timeout` is over.

    Parameters
    ----------
    timeout
        Seconds; with 0 there is one attempt.
    telling
        Who is in the way, for the one message that goes to the log ``tallstore`` (and so, where
        nobody has set up logging, to stderr).
    """
    began = time.monotonic()
    told = False
    while True:
        yield
        waited = time.monotonic() - began
        if waited >= timeout:
            return
        if waited >= _PATIENCE and not told:
            told = True
            _LOG.warning("%s; waiting up to %g s for it", telling(), timeout)
        time.sleep(_POLL)
