"""Calls of a group: order, replies, exceptions, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import hosted
import rayless
from conftest import Cluster, Gate
from rayless.exceptions import ActorDiedError, GetTimeoutError, PendingCallsLimitExceeded, RayTaskError


@pytest.fixture(scope="module")
def group(shared_cluster: Cluster) -> Iterator[rayless.WorkerGroup]:
    """Four ranks, two on each node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLESS_RUN_DIR", shared_cluster.run_dir)
        group = rayless.WorkerGroup.start(hosted.Plain, 4, strategy="SPREAD", args=(10,), kwargs={"step": 5})
        try:
            yield group
        finally:
            rayless.shutdown()


def test_every_rank_has_an_instance_made_with_the_arguments(group: rayless.WorkerGroup) -> None:
    found = group.call("where")
    assert found == [(info.rank, info.pid) for info in group.ranks]
    assert [info.rank for info in group.ranks] == [0, 1, 2, 3]
    assert {info.node_name for info in group.ranks} == {"a", "b"}
    assert group.ranks[0].node_name == "a", "rank 0 runs where its driver runs"
    assert group.call("add") == [15, 15, 15, 15]


def test_ranks_tells_who_replies_and_all_run_it(group: rayless.WorkerGroup) -> None:
    before = group.call("add")
    assert group.call("add", ranks=[2]) == [before[2] + 5]
    assert group.call("add", ranks=3) == [before[3] + 10]
    assert group.call("add", ranks=[]) == []
    assert group.call("add") == [value + 20 for value in before]
    assert group.call("where", ranks=[3, 1, 1]) == [(rank, group.ranks[rank].pid) for rank in (1, 3)]
    with pytest.raises(ValueError, match="there is no rank 4"):
        group.call("add", ranks=[4])
    with pytest.raises(ValueError, match="there is no rank -1"):
        group.call("add", ranks=-1)


def test_calls_run_in_the_order_they_were_made(group: rayless.WorkerGroup) -> None:
    futures = [group.call_async("note", word, ranks=[word % 4]) for word in range(50)]
    assert [future.result() for future in futures] == [[word] for word in range(50)]
    assert [seen[-50:] for seen in group.call("all_seen")] == [list(range(50))] * 4


def test_a_callable_gets_the_instance(group: rayless.WorkerGroup) -> None:
    group.call("note", "here")
    offset = 2
    assert all(seen[-1] == "here" for seen in group.call(hosted.seen_by))
    assert group.call(lambda plain, n: len(plain.seen) + n + offset, 1, ranks=0) == [len(group.call("all_seen")[0]) + 3]


def test_arguments_pass_but_for_the_two_reserved_words(group: rayless.WorkerGroup) -> None:
    given = {"method": 1, "cls": 2, "args": 3, "nested": {"a": [1, None, b"\x00"]}}
    assert group.call("echo", 1, "two", timeout=30, ranks=[1], **given) == [((1, "two"), given)]


@pytest.mark.parametrize("size", [0, 1, 65_535, 1 << 20, (1 << 20) + 1, 20 << 20])
def test_payloads_of_any_size_go_both_ways(group: rayless.WorkerGroup, size: int) -> None:
    data = bytes(bytearray(range(256))) * (size // 256) + b"\x07" * (size % 256)
    assert group.call("length", data) == [size] * 4
    assert [len(blob) for blob in group.call("blob", size)] == [size] * 4
    ((echoed,), _) = group.call("echo", data, ranks=3)[0]
    assert echoed == data


def test_an_exception_keeps_its_type_and_names_its_rank(group: rayless.WorkerGroup) -> None:
    with pytest.raises(ValueError, match="no such value") as caught:
        group.call("fail", "value", 2)
    error = caught.value
    assert isinstance(error, RayTaskError)
    assert error.rank == 2
    assert "raise {\n" in str(error) or "hosted.py" in str(error), "the remote traceback is in the message"
    assert f"({group.ranks[2].node_name}, pid {group.ranks[2].pid})" in str(error)
    with pytest.raises(FileNotFoundError) as missing:
        group.call("fail", "os")
    assert missing.value.errno == 2
    for kind in ("group", "final", "unpicklable", "interrupt"):
        with pytest.raises(RayTaskError):
            group.call("fail", kind)
    with pytest.raises(AttributeError, match="no_such_method"):
        group.call("no_such_method")
    assert group.call("length", b"still here") == [10] * 4


def test_what_a_rank_raises_that_was_not_asked_ends_the_wait(group: rayless.WorkerGroup, gate: Gate) -> None:
    """As a pipeline's first stage does while the last one waits for its tensor."""
    with pytest.raises(ValueError, match="no such value") as caught:
        group.call("fail", "value", 0, gate.path, ranks=[3])
    assert caught.value.rank == 0  # type: ignore[attr-defined]
    gate.open()
    assert group.call("length", b"") == [0] * 4


def test_what_cannot_be_pickled_is_said_before_anything_is_sent(group: rayless.WorkerGroup) -> None:
    import threading

    with pytest.raises(TypeError, match="pickle"):
        group.call("note", threading.Lock())
    with pytest.raises(TypeError, match="pickle") as caught:
        group.call(lambda _: __import__("threading").Lock(), ranks=1)
    assert isinstance(caught.value, RayTaskError), "the reply could not be pickled, there"


def test_a_timeout_leaves_the_group_usable(group: rayless.WorkerGroup, gate: Gate) -> None:
    with pytest.raises(GetTimeoutError, match=r"rank 1 has not replied to `through` within 0.1 s\nhint: ") as caught:
        group.call("through", gate.path, 1, ranks=[1], timeout=0.1)
    assert isinstance(caught.value, TimeoutError)
    gate.open()
    assert group.call("note", "after") == ["after"] * 4, "the late reply is not taken for this one's"


def test_the_65th_call_in_flight_is_refused(group: rayless.WorkerGroup, gate: Gate) -> None:
    held = [group.call_async("through", gate.path, 3, ranks=[3])]
    held += [group.call_async("note", word, ranks=[3]) for word in range(63)]
    with pytest.raises(PendingCallsLimitExceeded, match=r"rank 3 on node \w+.*\nhint: "):
        group.call("note", "one too many")
    gate.open()
    assert [future.result()[0] for future in held] == ["go", *range(63)]
    assert group.call("note", "again") == ["again"] * 4


def test_deferred_results_come_in_order_and_hold_nobody_up(group: rayless.WorkerGroup, gate: Gate) -> None:
    slow = group.call_async("later", "slow", gate.path, ranks=[1])
    plain = group.call_async("note", "plain", ranks=[1])
    others = group.call("note", "others", ranks=[0, 2, 3])
    assert others == ["others"] * 3, "the rank with the open result took the next call, and so did all others"
    assert not plain.done(), "replies of a rank keep their order"
    gate.open()
    assert slow.result() == ["slow"]
    assert plain.result() == ["plain"]
    with pytest.raises(LookupError, match="bad") as caught:
        group.call("later", "bad", ranks=[2])
    assert caught.value.rank == 2  # type: ignore[attr-defined]
    assert group.call("later", "good") == ["good"] * 4


def test_bad_arguments_are_refused(start: Callable[..., rayless.WorkerGroup]) -> None:
    for wrong, message in [
        ({"n": 0}, "makes no sense"),
        ({"n": 2, "bundles": [{"CPU": 1}]}, "1 bundles for 2 ranks"),
        ({"n": 1, "bundles": {"CPU": -1}}, "not a resource quantity"),
        ({"n": 1, "strategy": "LOOSE"}, "LOOSE is not a strategy"),
        ({"n": 1, "wait": -1}, "not a time"),
        ({"n": 2, "rank_env": [{}]}, "rank_env has 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(hosted.Plain, **wrong)


def test_a_constructor_that_raises_ends_the_start(start: Callable[..., rayless.WorkerGroup]) -> None:
    with pytest.raises(ArithmeticError, match="not on rank 1") as caught:
        start(hosted.Broken, 2, args=(1,), name="broken")
    assert isinstance(caught.value, RayTaskError)
    assert caught.value.rank == 1
    assert rayless.available_resources() == rayless.cluster_resources()


def test_a_stopped_group_says_so(start: Callable[..., rayless.WorkerGroup]) -> None:
    with start(hosted.Plain, 2) as group:
        pending = group.call_async("add")
        assert pending.result() == [1, 1]
    group.stop()
    with pytest.raises(ActorDiedError, match="the group was stopped\nhint: "):
        group.call("add")
    assert group.failure is None
