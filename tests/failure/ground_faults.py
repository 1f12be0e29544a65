"""What both kinds of cells do to the ground they play on: its daemons and its wire. Each gives when, on the monotonic clock."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable

from stage import Ground


def to_daemon(host: str, number: int) -> Callable[[Ground], float]:
    """Sends a host's daemon a signal; after SIGKILL it is gone."""

    def inject(ground: Ground) -> float:
        with contextlib.closing(ground.daemon(host)) as process:
            at = process.signal(number)
            if number == signal.SIGKILL:
                process.gone(5)
            return at

    return inject


def restart(host: str) -> Callable[[Ground], float]:
    """Starts a daemon again that was killed."""

    def undo(ground: Ground) -> float:
        at = time.monotonic()
        ground.restart_daemon(host)
        return at

    return undo


def wire(direction: str = "both", **rule: object) -> Callable[[Ground], float]:
    """Sets a rule of the wire."""

    def inject(ground: Ground) -> float:
        ground.wire.set(direction, **rule)
        return time.monotonic()

    return inject


def nothing(_ground: Ground) -> float:
    """For what needs no undoing."""
    return time.monotonic()


def clear(ground: Ground) -> float:
    """Takes the rules off the wire."""
    ground.wire.clear()
    return time.monotonic()
