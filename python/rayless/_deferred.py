"""``Deferred``: a result that is still being made when its method returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Deferred(Generic[T]):
    """Returned by a hosted method whose result is not there yet, such as a copy from a GPU still under way.

    The worker goes on to its next call at once; ``resolve`` runs in a thread of its own, one for the process, in the
    order of the calls, and what it returns or raises is the reply. Replies keep their order. On a rank that was not
    asked for a reply it is dropped without a call.
    """

    __slots__ = ("resolve",)

    def __init__(self, resolve: Callable[[], T]) -> None:
        self.resolve = resolve
