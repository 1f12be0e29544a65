"""Classes that the tests host."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import sys
import threading
import time
from typing import Any

import rayless


class Plain:
    """Remembers what it was asked, in order."""

    def __init__(self, start: int = 0, *, step: int = 1) -> None:
        self.value = start
        self.step = step
        self.seen: list[Any] = []

    def where(self) -> tuple[int | None, int]:
        return rayless.get_runtime_context().rank, os.getpid()

    def add(self) -> int:
        self.value += self.step
        return self.value

    def note(self, word: Any) -> Any:
        self.seen.append(word)
        return word

    def all_seen(self) -> list[Any]:
        return self.seen

    def echo(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    def length(self, data: bytes) -> int:
        return len(data)

    def blob(self, size: int) -> bytes:
        return b"x" * size

    def through(self, gate: str, rank: int | None = None) -> str:
        """Waits until the gate opens; on one rank only where a rank is given."""
        if rank is not None and rayless.get_runtime_context().rank != rank:
            return "passed"
        pass_through(gate)
        return "go"

    def for_ever(self) -> None:
        """Does not come back."""
        while True:
            signal.pause()

    def hold_the_lock(self, rank: int) -> None:
        """On that rank: is in C for ever, without giving the interpreter's lock away."""
        if rayless.get_runtime_context().rank == rank:
            re.match("(a+)+$", "a" * 60 + "b")

    def environ(self, *names: str) -> list[str | None]:
        return [os.environ.get(name) for name in names]

    def interpreter(self) -> tuple[str, str, list[str]]:
        return sys.executable, os.getcwd(), sys.path

    def say(self, text: str) -> None:
        print(text)

    def leave(self, rank: int) -> None:
        if rayless.get_runtime_context().rank == rank:
            sys.exit(3)

    def later(self, word: str, gate: str | None = None) -> rayless.Deferred[str]:
        def resolve() -> str:
            if gate is not None:
                pass_through(gate)
            if word == "bad":
                raise LookupError(word)
            return word

        return rayless.Deferred(resolve)

    def fail(self, kind: str, rank: int | None = None, gate: str | None = None) -> None:
        """Raises on that rank, or on all; the others wait at the gate where there is one."""
        if rank is not None and rayless.get_runtime_context().rank != rank:
            if gate is not None:
                pass_through(gate)
            return
        raise {
            "value": ValueError("no such value"),
            "os": FileNotFoundError(2, "no such file", "/nowhere"),
            "group": Picky("a", code=7),
            "final": Final("cannot be a base"),
            "unpicklable": Unpicklable(threading.Lock()),
            "interrupt": KeyboardInterrupt(),
        }[kind]


class Picky(Exception):
    """Takes a keyword that pickle does not give back."""

    def __init__(self, text: str, *, code: int) -> None:
        super().__init__(text)
        self.code = code


class Final(Exception):
    """Refuses to be subclassed."""

    def __init_subclass__(cls) -> None:
        raise TypeError("final")


class Unpicklable(Exception):
    """Holds a lock."""


class Broken:
    """Its constructor fails on one rank."""

    def __init__(self, rank: int) -> None:
        if rayless.get_runtime_context().rank == rank:
            raise ArithmeticError(f"not on rank {rank}")


def pass_through(gate: str) -> None:
    """Returns when the test has opened its gate."""
    with open(gate) as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def seen_by(instance: Plain) -> list[Any]:
    """A function that gets the instance."""
    return instance.seen


def now() -> float:
    return time.monotonic()
