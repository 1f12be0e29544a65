"""Links between workers of two hosts, through real daemons: what carries them, what `status` says, and what they survive."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from stage import Stage

pytestmark = pytest.mark.quick


@pytest.fixture
def stage(stages: Callable[..., Stage]) -> Iterator[Stage]:
    """A stage with a group of two ranks on each host, which is well and leaves nothing at the end."""
    stage = stages()
    try:
        stage.start()
        yield stage
        stage.driver.ask("stop", "stopped")
        stage.wait_alive(0)
        assert stage.leftovers() == []
    except BaseException:
        stages(give_up=True)
        raise


def ends(stage: Stage) -> tuple[int, int]:
    return stage.worker_rank("a"), stage.worker_rank("b")


def shown(stage: Stage, sender: int, receiver: int) -> list[dict[str, Any]]:
    """The link as `status` shows it."""
    links = stage.cluster.status(0)["links"]
    return [
        link for link in links if (link["group"], link["from"], link["to"]) == (stage.group["group"], sender, receiver)
    ]


def test_tensors_cross_by_tcp_and_status_says_why(stage: Stage) -> None:
    there, back = ends(stage)
    for sender, receiver in ((there, back), (back, there)):
        stage.driver.do("call", method="cross", args=[sender, receiver, 3 << 20, 4])
        called = stage.driver.wait("called")
        assert called["ok"], called
        stage.until(lambda s=sender, r=receiver: bool(shown(stage, s, r)), "status shows the link")  # type: ignore[misc]
        (link,) = shown(stage, sender, receiver)
        assert link["transport"] == "tcp"
        rejected = {entry["transport"]: entry["reason"] for entry in link["rejected"]}
        assert "two hosts" in rejected["shm"]
        assert "no RDMA device" in rejected["rdma"]


def test_ranks_of_one_host_share_memory(stage: Stage) -> None:
    first = stage.worker_rank("b")
    node = next(rank["node"] for rank in stage.group["ranks"] if rank["rank"] == first)
    ranks = sorted(rank["rank"] for rank in stage.group["ranks"] if rank["node"] == node)
    stage.driver.do("call", method="cross", args=[ranks[0], ranks[1], 3 << 20, 4])
    called = stage.driver.wait("called")
    assert called["ok"], called
    stage.until(lambda: bool(shown(stage, ranks[0], ranks[1])), "status shows the link")
    (link,) = shown(stage, ranks[0], ranks[1])
    assert (link["transport"], link["rejected"]) == ("shm", [])


def test_a_link_waits_for_the_daemon_of_its_receiver_to_return(stage: Stage) -> None:
    sender, receiver = ends(stage)
    daemon = stage.daemon("b")
    daemon.signal(signal.SIGKILL)
    assert daemon.gone(10)
    daemon.close()
    stage.driver.do("call", method="cross", args=[sender, receiver, 1000, 4])
    stage.restart_daemon("b")
    called = stage.driver.wait("called")
    assert called["ok"], called


def test_a_peer_killed_in_a_link_is_the_end_of_the_group_with_that_cause(stages: Callable[..., Stage]) -> None:
    stage = stages()
    try:
        stage.start()
        sender, receiver = ends(stage)
        stage.driver.do("call", method="cross", args=[sender, receiver, 1000, 1_000_000])
        stage.until(lambda: bool(shown(stage, sender, receiver)), "status shows the link")
        since = stage.worker("b").signal(signal.SIGKILL)
        called = stage.driver.wait("called")
        assert not called["ok"]
        assert called["type"] == "WorkerDiedError", called
        assert "was killed by SIGKILL" in called["line"], called
        gone, left = stage.group_gone(since)
        assert gone is not None, left
        assert stage.leftovers() == []
    except BaseException:
        stages(give_up=True)
        raise
