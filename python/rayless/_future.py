"""``CallFuture``: a ``concurrent.futures.Future`` that its waiter completes.

``result()`` waits in the caller's own thread, where the reply arrives; no thread hands it over. Only what needs to be
told, a callback or one of ``concurrent.futures.wait``, ``as_completed`` and ``asyncio.wrap_future``, has rayless's callback
thread complete the future.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import Any

from rayless import _rayless, _replies

# States of a future that still waits for its call.
_OPEN = ("PENDING", "RUNNING")


class _Waiters(list[Any]):
    """The list in which ``wait`` and ``as_completed`` leave word that they want to be told."""

    def __init__(self, watch: Callable[[], None]) -> None:
        super().__init__()
        self._watch = watch

    def append(self, waiter: Any) -> None:
        super().append(waiter)
        self._watch()


class CallFuture(concurrent.futures.Future[list[Any]]):
    """The results of one call, in ascending rank."""

    _state: str
    _condition: Any

    def __init__(self, call: _rayless.Call, method: str, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self._call = call
        self._method = method
        self._ranks = ranks
        self._watched = False
        self._taken = False
        self._waiters = _Waiters(self._watch)

    def result(self, timeout: float | None = None) -> list[Any]:
        """As ``WorkerGroup.call``; after ``timeout`` seconds a ``GetTimeoutError``, and it may be asked again."""
        self._wait(timeout)
        return super().result(None)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What ``result`` would raise, or ``None``."""
        self._wait(timeout)
        return super().exception(None)

    def done(self) -> bool:
        """Whether ``result`` would return at once."""
        if self._state in _OPEN and self._call.is_done():
            self._complete()
        return super().done()

    def cancel(self) -> bool:
        """Drops the reply. The workers run the call all the same, in its place."""
        cancelled = super().cancel()
        if cancelled:
            self._call.abandon()
        return cancelled

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[list[Any]]], object]) -> None:
        """``fn(self)`` when it is done: in a thread of rayless, or at once."""
        super().add_done_callback(fn)
        self._watch()

    def _watch(self) -> None:
        if not self._watched and self._state in _OPEN:
            self._watched = True
            self._call.on_done(self._complete)

    def _wait(self, timeout: float | None) -> None:
        if self._state not in _OPEN:
            return
        if not self._call.wait(timeout) and self._state in _OPEN:
            from rayless.exceptions import timed_out

            raise timed_out(self._method, timeout or 0.0, self._call.missing())
        self._complete()

    def _complete(self) -> None:
        """Takes the outcome of a call that is done. The first to come does it; others wait for it to be set."""
        with self._condition:
            if self._taken or self._state not in _OPEN:
                return
            self._taken = True
        try:
            value, error = _replies.results(self._ranks, self._method, self._call.take()), None
        except Exception as raised:
            value, error = [], raised
        # Cancelled meanwhile: nobody wants it any more.
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if error is None:
                self.set_result(value)
            else:
                self.set_exception(error)
