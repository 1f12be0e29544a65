"""How groups end: in order, by a death, with their driver; and that nothing is left."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

import hosted
import rayless
from conftest import Cluster, Gate, gone, groups_named
from rayless.exceptions import ActorDiedError, NodeDiedError, RayError, WorkerDiedError

Start = Callable[..., rayless.WorkerGroup]


def test_stop_leaves_no_process_and_is_idempotent(start: Start) -> None:
    group = start(hosted.Plain, 4, strategy="SPREAD", name="to stop")
    pids = [info.pid for info in group.ranks]
    group.stop()
    assert gone(pids, within=0)
    group.stop()
    assert all(group["state"] == "stopped" for group in groups_named("to stop"))
    assert rayless.available_resources() == rayless.cluster_resources()


@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_worker_fails_all_calls_with_one_cause(start: Start, gate: Gate, rank: int) -> None:
    group = start(hosted.Plain, 4, strategy="SPREAD", name=f"to kill {rank}")
    told: list[Exception] = []
    happened = threading.Event()
    group.add_failure_callback(told.append)
    group.add_failure_callback(lambda _: happened.set())
    pids = [info.pid for info in group.ranks]
    pending = [group.call_async("through", gate.path, 1), group.call_async("add")]
    os.kill(pids[rank], signal.SIGKILL)
    for future in pending:
        with pytest.raises(WorkerDiedError, match=f"rank {rank}") as caught:
            future.result(30)
        assert caught.value.rank == rank
        assert caught.value.node == group.ranks[rank].node_name
    cause = str(pending[0].exception())
    for _ in range(2):
        with pytest.raises(ActorDiedError) as later:
            group.call("add")
        assert str(later.value) == cause
    assert happened.wait(30)
    assert [str(error) for error in told] == [cause]
    group.add_failure_callback(told.append)
    assert len(told) == 2, "at once where it has failed"
    assert str(group.failure) == cause
    assert gone(pids), "the others are killed, too"
    group.stop()


def test_a_method_that_exits_ends_the_group(start: Start) -> None:
    group = start(hosted.Plain, 2)
    with pytest.raises(WorkerDiedError, match="rank 1"):
        group.call("leave", 1)


def test_the_last_output_of_a_dead_worker_is_in_the_message(start: Start) -> None:
    group = start(hosted.Plain, 1)
    with pytest.raises(WorkerDiedError, match="the last thing it said"):
        group.call(lambda _: (print("the last thing it said", flush=True), os.kill(os.getpid(), signal.SIGKILL)))


def test_a_failure_callback_that_raises_is_printed(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    group = start(hosted.Plain, 1)
    happened = threading.Event()

    def bad(_: Exception) -> None:
        happened.set()
        raise ValueError("out of a callback")

    second = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.unraisablehook", lambda unraisable: print(unraisable.exc_value, file=__import__("sys").stderr)
        )
        group.add_failure_callback(bad)
        group.add_failure_callback(lambda _: second.set())
        os.kill(group.ranks[0].pid, signal.SIGKILL)
        assert happened.wait(30)
        assert second.wait(30)
    assert "out of a callback" in capfd.readouterr().err


DRIVER = """
import hosted, os, rayless, sys
group = rayless.WorkerGroup.start(hosted.Plain, 2, strategy="SPREAD")
print(*[info.pid for info in group.ranks], flush=True)
group.call("add")
{end}
"""


@pytest.mark.parametrize(
    "end",
    [
        "",
        "sys.exit(4)",
        "os._exit(0)",
        "os.kill(os.getpid(), 9)",
        "raise RuntimeError",
        "pending = group.call_async('for_ever')",
        "import threading; future = group.call_async('add'); future.add_done_callback(print)",
        "del group",
    ],
)
def test_workers_end_with_their_driver(cluster: Cluster, end: str) -> None:
    driver = cluster.driver(DRIVER.format(end=end))
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    driver.communicate(timeout=60)
    assert len(pids) == 2
    assert gone(pids)


def test_a_forked_child_is_no_part_of_it(start: Start) -> None:
    group = start(hosted.Plain, 2)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            group.call("add")
        except RayError as error:
            said = str(error)
        group.stop()
        said += f" {rayless.is_initialized()}"
        del group
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert said.startswith(f"this group belongs to process {os.getpid()}")
    assert said.endswith("False")
    assert group.call("add") == [1, 1]


def test_a_forked_child_that_ends_in_order_stops_nothing(cluster: Cluster) -> None:
    code = """
import hosted, os, rayless, sys
group = rayless.WorkerGroup.start(hosted.Plain, 2)
child = os.fork()
if child == 0:
    sys.exit(0)
os.waitpid(child, 0)
print(group.call("add"))
"""
    out, err = cluster.driver(code).communicate(timeout=60)
    assert out.strip() == "[1, 1]", err


def test_workers_end_though_a_forked_child_of_the_driver_lives_on(cluster: Cluster) -> None:
    code = """
import hosted, os, rayless
group = rayless.WorkerGroup.start(hosted.Plain, 2, strategy="SPREAD")
print(*[info.pid for info in group.ranks], flush=True)
child = os.fork()
if child == 0:
    os.read(0, 1)
    os._exit(0)
os.kill(os.getpid(), 9)
"""
    driver = cluster.driver(code)
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    assert len(pids) == 2
    ended = gone(pids, within=20)
    driver.communicate("x", timeout=60)
    assert ended


def test_ctrl_c_gives_up_a_wait_and_leaves_the_group_usable(cluster: Cluster, gate: Gate) -> None:
    code = """
import hosted, rayless
group = rayless.WorkerGroup.start(hosted.Plain, 2)
try:
    print("started", flush=True)
    group.call("through", GATE, 0)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    print(group.call("add"))
"""
    driver = cluster.driver(code.replace("GATE", repr(gate.path)))
    assert driver.stdout is not None
    assert driver.stdout.readline() == "started\n"
    driver.send_signal(signal.SIGINT)
    assert driver.stdout.readline() == "interrupted\n"
    gate.open()
    out, err = driver.communicate(timeout=60)
    assert out.strip() == "[1, 1]", err


def test_a_node_that_is_stopped_ends_the_groups_on_it(own_cluster: Cluster) -> None:
    group = rayless.WorkerGroup.start(hosted.Plain, 2, strategy="STRICT_SPREAD")
    remote = next(info for info in group.ranks if info.node_name == "b")
    told = threading.Event()
    group.add_failure_callback(lambda _: told.set())
    own_cluster.nodes[1].command("stop")
    assert told.wait(30)
    with pytest.raises(ActorDiedError):
        group.call("add")
    assert gone([info.pid for info in group.ranks])
    assert remote.rank == 1


def test_stop_group_from_elsewhere(cluster: Cluster, start: Start) -> None:
    group = start(hosted.Plain, 2, strategy="SPREAD")
    told = threading.Event()
    group.add_failure_callback(lambda _: told.set())
    cluster.nodes[1].command("stop", "--group", group.id)
    assert told.wait(30)
    with pytest.raises(ActorDiedError) as caught:
        group.call("add")
    assert not isinstance(caught.value, (WorkerDiedError, NodeDiedError))
    assert gone([info.pid for info in group.ranks])
