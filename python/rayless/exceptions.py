"""What goes wrong, as types. Names and meanings are Ray's where Ray has them.

======================================  ==============================================================
``RayError``                            base of all
``RayTaskError``                        a method raised; also an instance of the type that it raised
``GetTimeoutError``                     no reply in time; the group stays usable (a ``TimeoutError``)
``RayActorError``                       the group cannot take calls
``ActorDiedError``                      … because it is over: every later call raises the same
``WorkerDiedError``, ``NodeDiedError``  … because a rank's process, or a node, died
``PendingCallsLimitExceeded``           too many calls in flight
``RaySystemError``                      something that is none of the caller's doing
``ClusterNotFoundError``                no daemon or no head here (a ``ConnectionError``)
``LaunchError``                         a group could not be started
``PlacementError``, ``RefusedError``    … for want of nodes or resources; by policy
``LinkError``                           a link between two ranks; base of the next
``LinkRejectedError``                   the caller's mistake: nothing was sent (a ``ValueError``)
``LinkTimeoutError``                    not in time; the link stays usable (a ``TimeoutError``)
``LinkClosedError``                     one end was closed in order
``LinkLostError``                       lost in the middle: every later call raises the same (a ``ConnectionError``)
``LinkUnavailableError``                could not be opened (a ``ConnectionError``)
======================================  ==============================================================

The message is one line of cause, then ``hint:`` with what to do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

__all__ = [
    "ActorDiedError",
    "ClusterNotFoundError",
    "GetTimeoutError",
    "LaunchError",
    "LinkClosedError",
    "LinkError",
    "LinkLostError",
    "LinkRejectedError",
    "LinkTimeoutError",
    "LinkUnavailableError",
    "NodeDiedError",
    "PendingCallsLimitExceeded",
    "PlacementError",
    "RayActorError",
    "RayError",
    "RaySystemError",
    "RayTaskError",
    "RefusedError",
    "WorkerDiedError",
]

if sys.version_info >= (3, 11):
    _Timeout = TimeoutError
else:
    import concurrent.futures

    # Of its own type there; who waits for a future expects it.
    class _Timeout(TimeoutError, concurrent.futures.TimeoutError):
        pass


class RayError(Exception):
    """Base of all errors of rayless."""


class RaySystemError(RayError):
    """Something that neither the caller nor the called method did."""


class ClusterNotFoundError(RayError, ConnectionError):
    """No daemon runs here, or it has no head."""


class LaunchError(RayError):
    """A group could not be started."""


class PlacementError(LaunchError):
    """Nodes or resources were short for as long as the launch was told to wait."""


class RefusedError(LaunchError):
    """Refused by policy: identity or versions."""


class PendingCallsLimitExceeded(RayError):
    """More calls in flight than a group takes; the slowest rank is named."""


class GetTimeoutError(RayError, _Timeout):
    """No reply in time. The call runs on, its reply is dropped, and the group stays usable."""


class RayActorError(RayError):
    """The group cannot take calls."""


class ActorDiedError(RayActorError):
    """The group is over. ``rank`` and ``node`` (a name) tell where it began, as far as that is known."""

    def __init__(self, message: str, rank: int | None = None, node: str | None = None) -> None:
        super().__init__(message, rank, node)
        self.rank = rank
        self.node = node

    def __str__(self) -> str:
        return str(self.args[0])


class WorkerDiedError(ActorDiedError):
    """A rank's process ended."""


class StepDeadlineError(ActorDiedError):
    """A step took longer than its deadline, and the group was ended. ``ranks``: those that made no progress."""

    def __init__(
        self, message: str, ranks: Sequence[int] = (), rank: int | None = None, node: str | None = None
    ) -> None:
        super().__init__(message, rank if rank is not None or not ranks else ranks[0], node)
        self.ranks = list(ranks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.ranks, self.rank, self.node)


class NodeDiedError(ActorDiedError):
    """A node with ranks of the group is gone, or cut off."""


class LinkError(RayError):
    """Something about a link. ``link`` is its name, ``from_rank`` and ``to_rank`` its ends, ``kind`` what exactly (a few words)."""

    def __init__(
        self,
        message: str,
        link: str | None = None,
        from_rank: int | None = None,
        to_rank: int | None = None,
        kind: str | None = None,
    ) -> None:
        # Not `super()`: for some of the family the next in line is `OSError`, which makes other things of five arguments.
        Exception.__init__(self, message, link, from_rank, to_rank, kind)
        self.link = link
        self.from_rank = from_rank
        self.to_rank = to_rank
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args


class LinkRejectedError(LinkError, ValueError):
    """A tensor, buffer or call that the link does not take. Found before anything moved; the link stays usable."""


class LinkTimeoutError(LinkError, _Timeout):
    """Nothing came, or left, in time. The link stays usable and the call can be made again."""


class LinkClosedError(LinkError):
    """One end was closed after a whole message; nothing is lost."""


class LinkLostError(LinkError, ConnectionError):
    """The link broke: its peer is gone, the ends are at different steps, or a call was stopped in the middle of a message."""


class LinkUnavailableError(LinkError, ConnectionError):
    """The link could not be opened: no transport is both allowed and working, or the other end never asked for it."""


class RayTaskError(RayError):
    """A method raised on a rank.

    What is caught is also an instance of the type raised there, where such a class can be made: ``except
    ValueError`` works. Attributes of the original are reached through it, the original itself is ``cause``
    (``None`` where it could not travel).
    """

    def __init__(
        self,
        rank: int,
        method: str,
        type_name: str,
        text: str,
        remote_traceback: str,
        cause: BaseException | None = None,
        where: str = "",
    ) -> None:
        # Not `super()`: next in line may be the constructor of the type that was raised, with parameters of its own.
        Exception.__init__(self, text)
        self.rank = rank
        self.method = method
        self.type_name = type_name
        self.text = text
        self.remote_traceback = remote_traceback
        self.cause = cause
        self.where = where
        self.__cause__ = cause

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        head = f"rank {self.rank}{where} raised in `{self.method}`: {self.type_name}: {self.text}"
        return f"{head}\n\n{self.remote_traceback}" if self.remote_traceback else head

    def __repr__(self) -> str:
        return f"RayTaskError(rank={self.rank}, method={self.method!r}, {self.type_name}: {self.text})"

    def __getattr__(self, name: str) -> Any:
        # Only what is not found otherwise comes here, for example `errno` or a field of a user's own exception.
        cause = self.__dict__.get("cause")
        if cause is None or name.startswith("__"):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(cause, name)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.rank, self.method, self.type_name, self.text, self.remote_traceback, self.where)
        return _rebuild, (*fields, _pickled(self.cause))


# An instance of these is a signal to the interpreter or to a coroutine, not news from another process.
_NEVER_BOTH = (StopIteration, StopAsyncIteration)


def as_instance_of_cause(error: RayTaskError) -> RayTaskError:
    """``error`` as an instance of the type of its cause too; ``error`` itself where no such class can be made."""
    cause = error.cause
    if not isinstance(cause, Exception) or isinstance(cause, (RayTaskError, *_NEVER_BOTH)):
        return error
    both = _class_of_both(type(cause))
    if both is None:
        return error
    try:
        made = both.__new__(both)
        RayTaskError.__init__(
            made, error.rank, error.method, error.type_name, error.text, error.remote_traceback, cause, error.where
        )
        _copy_slots(cause, made)
    except Exception:  # a type with a `__new__` or `__setattr__` of its own mind
        return error
    return made


def _copy_slots(cause: Exception, made: RayTaskError) -> None:
    """Gives ``made`` what the type keeps outside of ``__dict__``, such as ``errno``: there `__getattr__` is never asked."""
    for base in type(cause).__mro__:
        for name, field in vars(base).items():
            if not name.startswith("__") and type(field).__name__ in ("member_descriptor", "getset_descriptor"):
                try:
                    setattr(made, name, getattr(cause, name))
                except (AttributeError, TypeError):  # unset, or read-only
                    continue


_both: dict[type, type[RayTaskError] | None] = {}


def _class_of_both(cause: type[BaseException]) -> type[RayTaskError] | None:
    if cause not in _both:
        name = f"RayTaskError({cause.__name__})"
        names = {"__module__": RayTaskError.__module__, "__qualname__": name, "__doc__": RayTaskError.__doc__}
        try:
            _both[cause] = type(name, (RayTaskError, cause), names)
        except (
            Exception
        ):  # final, another metaclass, a hook in `__init_subclass__`, memory layouts that do not go together
            _both[cause] = None
    return _both[cause]


def _pickled(cause: BaseException | None) -> bytes | None:
    if cause is None:
        return None
    from rayless import _pickle

    return _pickle.dumps_exception(cause)


def _rebuild(
    rank: int, method: str, type_name: str, text: str, remote_traceback: str, where: str, cause: bytes | None
) -> RayTaskError:
    from rayless import _pickle

    error = RayTaskError(rank, method, type_name, text, remote_traceback, _pickle.loads_exception(cause), where)
    return as_instance_of_cause(error)


def timed_out(method: str, timeout: float, missing: Sequence[int]) -> GetTimeoutError:
    """No reply of ``missing`` within ``timeout`` seconds."""
    ranks = ", ".join(map(str, missing))
    who = f"rank {ranks} has" if len(missing) == 1 else f"ranks {ranks} have"
    return GetTimeoutError(
        f"{who} not replied to `{method}` within {timeout:g} s\n"
        "hint: the call runs on and its reply is dropped; give a longer timeout=, or stop() the group"
    )
