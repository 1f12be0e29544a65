"""An exception crosses processes and keeps its type."""

from __future__ import annotations

import concurrent.futures
import pickle
import threading

import pytest

from hosted import Final, Picky, Unpicklable
from rayless import _pickle, _replies
from rayless.exceptions import (
    ActorDiedError,
    ClusterNotFoundError,
    GetTimeoutError,
    LinkClosedError,
    LinkError,
    LinkLostError,
    LinkRejectedError,
    LinkTimeoutError,
    LinkUnavailableError,
    NodeDiedError,
    RayError,
    RayTaskError,
    WorkerDiedError,
)


def crossed(error: BaseException) -> Exception:
    """As a worker sends it and a driver raises it."""
    try:
        raise error
    except BaseException as raised:
        return _replies.raised(3, "b, pid 7", _pickle.dumps_raised("step", raised))


def test_is_caught_by_its_own_type_and_by_rays() -> None:
    error = crossed(ValueError("no such value"))
    assert isinstance(error, ValueError)
    assert isinstance(error, RayTaskError)
    assert isinstance(error, RayError)
    assert error.rank == 3
    assert type(error.cause) is ValueError
    first, *rest = str(error).splitlines()
    assert first == "rank 3 (b, pid 7) raised in `step`: ValueError: no such value"
    assert "Traceback (most recent call last):" in rest
    assert type(error) is type(crossed(ValueError("another")))


def test_attributes_of_the_original_are_there() -> None:
    error = crossed(FileNotFoundError(2, "no such file", "/nowhere"))
    assert isinstance(error, FileNotFoundError)
    assert (error.errno, error.filename) == (2, "/nowhere")


@pytest.mark.parametrize(
    ("original", "is_also", "has_cause"),
    [
        (Picky("a", code=7), False, False),  # pickle cannot make it again
        (Unpicklable(threading.Lock()), False, False),
        (Final("x"), False, True),  # no class can be both
        (KeyboardInterrupt(), False, True),  # nobody pressed Ctrl-C here
        (StopIteration(1), False, True),  # would end somebody's loop
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), True, True),
        (KeyError("k"), True, True),
    ],
)
def test_odd_exceptions_arrive_too(original: BaseException, is_also: bool, has_cause: bool) -> None:
    error = crossed(original)
    assert isinstance(error, RayTaskError)
    assert isinstance(error, type(original)) == is_also
    assert (error.cause is not None) == has_cause
    assert type(original).__name__ in str(error)


def test_crosses_a_second_time() -> None:
    error = pickle.loads(pickle.dumps(crossed(ValueError("twice"))))
    assert isinstance(error, ValueError)
    assert isinstance(error, RayTaskError)
    assert error.rank == 3
    assert "twice" in str(error)
    nested = crossed(error)
    assert isinstance(nested, RayTaskError)


def test_the_family() -> None:
    assert issubclass(GetTimeoutError, TimeoutError)
    assert issubclass(GetTimeoutError, concurrent.futures.TimeoutError)
    assert issubclass(WorkerDiedError, ActorDiedError)
    assert issubclass(NodeDiedError, ActorDiedError)
    assert issubclass(ClusterNotFoundError, ConnectionError)
    died = pickle.loads(pickle.dumps(WorkerDiedError("rank 1 died", 1, "b")))
    assert (str(died), died.rank, died.node) == ("rank 1 died", 1, "b")


@pytest.mark.parametrize(
    "kind", [LinkError, LinkRejectedError, LinkTimeoutError, LinkClosedError, LinkLostError, LinkUnavailableError]
)
def test_a_links_error_crosses_with_its_ends(kind: type[LinkError]) -> None:
    """Some of them are `OSError` as well, which has ideas of its own about arguments and pickling."""
    error = crossed(kind("link 0->1.0 is lost\nhint: look", "link 0->1.0", 0, 1, "peer gone"))
    assert isinstance(error, kind)
    assert isinstance(error, RayTaskError)
    assert type(error.cause) is kind
    assert str(error.cause) == "link 0->1.0 is lost\nhint: look"
    assert (error.link, error.from_rank, error.to_rank, error.kind) == ("link 0->1.0", 0, 1, "peer gone")
