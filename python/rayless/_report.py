"""What a launch that takes its time tells people, on stderr."""

from __future__ import annotations

import sys
import time

_PERIOD_S = 10.0


class Reporter:
    """Prints the need/have table as it comes (at once, then each 10 s), and what a slow start waits for."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def waiting(self, text: str) -> None:
        """Nodes or resources are short; ``text`` is the table."""
        self._say(f"rayless: waiting: {text}")

    def starting(self, ready: int, of: int) -> None:
        """Called all along while workers start."""
        if time.monotonic() - self._told > _PERIOD_S:
            self._say(f"rayless: {ready} of {of} workers are up")

    def _say(self, text: str) -> None:
        self._told = time.monotonic()
        if sys.stderr is not None:  # a program without a terminal may have none
            print(text, file=sys.stderr, flush=True)
