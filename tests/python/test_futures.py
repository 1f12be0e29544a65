"""``call_async``: a real ``concurrent.futures.Future``."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator

import pytest

import hosted
import rayless
from conftest import Cluster, Gate
from rayless.exceptions import GetTimeoutError


@pytest.fixture(scope="module")
def group(shared_cluster: Cluster) -> Iterator[rayless.WorkerGroup]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLESS_RUN_DIR", shared_cluster.run_dir)
        try:
            yield rayless.WorkerGroup.start(hosted.Plain, 2, strategy="SPREAD")
        finally:
            rayless.shutdown()


def test_result_and_exception(group: rayless.WorkerGroup) -> None:
    future = group.call_async("note", "x")
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(30) == ["x", "x"]
    assert future.exception() is None
    assert future.done()
    failed = group.call_async("fail", "value")
    assert isinstance(failed.exception(30), ValueError)
    with pytest.raises(ValueError, match="no such value"):
        failed.result()


def test_wait_and_as_completed(group: rayless.WorkerGroup, gate: Gate) -> None:
    slow = group.call_async("later", "slow", gate.path, ranks=[0])
    quick = group.call_async("note", "quick", ranks=[1])
    done, pending = concurrent.futures.wait([slow, quick], 30, concurrent.futures.FIRST_COMPLETED)
    assert (done, pending) == ({quick}, {slow})
    gate.open()
    assert set(concurrent.futures.as_completed([slow, quick], 30)) == {slow, quick}
    many = [group.call_async("note", word) for word in range(40)]
    assert concurrent.futures.wait(many, 30).not_done == set()
    assert [future.result()[1] for future in many] == list(range(40))


def test_asyncio(group: rayless.WorkerGroup) -> None:
    async def ask() -> list[list[str]]:
        return await asyncio.gather(*(asyncio.wrap_future(group.call_async("note", word)) for word in "abc"))

    assert asyncio.run(ask()) == [["a", "a"], ["b", "b"], ["c", "c"]]


def test_callbacks_run_once_when_it_is_done(group: rayless.WorkerGroup, gate: Gate) -> None:
    told: list[concurrent.futures.Future[list[object]]] = []
    happened = threading.Event()
    future = group.call_async("through", gate.path, 1)
    future.add_done_callback(told.append)
    future.add_done_callback(lambda _: happened.set())
    assert told == []
    gate.open()
    assert happened.wait(30)
    assert told == [future]
    future.add_done_callback(told.append)
    assert told == [future, future], "at once where it is done"


def test_many_threads_may_wait_for_one_future(group: rayless.WorkerGroup, gate: Gate) -> None:
    future = group.call_async("through", gate.path, 0)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = [pool.submit(future.result, 30) for _ in range(4)]
        gate.open()
        assert [result.result(30) for result in results] == [["go", "passed"]] * 4


def test_a_cancelled_future_does_not_break_the_order(group: rayless.WorkerGroup, gate: Gate) -> None:
    held = group.call_async("through", gate.path, 0)
    dropped = group.call_async("note", "dropped")
    kept = group.call_async("note", "kept")
    assert dropped.cancel()
    assert dropped.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        dropped.result()
    gate.open()
    assert kept.result() == ["kept", "kept"]
    assert held.result()[0] == "go"
    assert not held.cancel()
    assert group.call("all_seen")[0][-2:] == ["dropped", "kept"], "the workers ran it all the same"


def test_cancelling_wakes_who_waits(group: rayless.WorkerGroup, gate: Gate) -> None:
    future = group.call_async("through", gate.path, 0)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(future.result)
        assert future.cancel()
        assert isinstance(waiting.exception(30), concurrent.futures.CancelledError)
    gate.open()
    assert group.call("note", 1) == [1, 1]


def test_a_timeout_of_result_may_be_followed_by_another_try(group: rayless.WorkerGroup, gate: Gate) -> None:
    future = group.call_async("through", gate.path, 0)
    with pytest.raises(GetTimeoutError, match="`through`"):
        future.result(0.05)
    with pytest.raises(TimeoutError):
        future.exception(0.05)
    assert not future.done()
    gate.open()
    assert future.result(30)[0] == "go"


def test_the_timeout_of_a_call_ends_its_future(group: rayless.WorkerGroup, gate: Gate) -> None:
    future = group.call_async("through", gate.path, 0, timeout=0.05)
    told = threading.Event()
    future.add_done_callback(lambda _: told.set())
    assert told.wait(30), "nobody asked for the result, and the callback came all the same"
    assert isinstance(future.exception(), GetTimeoutError)
    gate.open()
    assert group.call("note", 1) == [1, 1]


def test_forgotten_futures_change_nothing(group: rayless.WorkerGroup) -> None:
    for word in range(30):
        group.call_async("note", word)
    assert group.call("all_seen")[1][-30:] == list(range(30))
