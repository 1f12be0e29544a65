"""Which transport a link gets, what else was not taken and why: real daemons on two hosts, and what they show of it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from netns import Host, hosts, unavailable
from serving import Cluster, until

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

NO_DEVICE = "no RDMA device in /sys/class/infiniband"
#: This machine may have devices; what a host without any says is another matter then.
needs_no_rdma = pytest.mark.skipif(
    os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband")),
    reason="there are RDMA devices",
)


class Nodes(Cluster):
    """A daemon on each host, with flags of its own."""

    def __init__(self, pair: list[Host], flags: dict[int, list[str]]) -> None:
        super().__init__(pair, cpus=8)
        self._flags = flags

    def _shared(self, index: int) -> list[str]:
        return [*super()._shared(index), *self._flags.get(index, [])]

    def text(self, *words: str, index: int = 0) -> str:
        """What a command says."""
        done = self.hosts[index].run(
            [self.rayless, *words, "--run-dir", str(self.run_dir(index))], env=self.environment(index)
        )
        return done.stdout

    def links(self, index: int = 0) -> list[dict[str, Any]]:
        """``links`` of ``rayless status --json``."""
        shown: list[dict[str, Any]] = self.status(index)["links"]
        return shown

    def kill(self, index: int) -> None:
        """Ends a daemon by SIGKILL; what it started goes on."""
        pid = self.daemon_pid(index)
        with open(os.pidfd_open(pid), closefd=True) as process:
            os.kill(pid, signal.SIGKILL)
            select.select([process], [], [], 10)


class Driver:
    """`linked.py` on a host."""

    def __init__(self, nodes: Nodes, index: int = 0, **env: str) -> None:
        self._process = subprocess.Popen(
            nodes.hosts[index].argv([sys.executable, str(Path(__file__).parent / "linked.py")]),
            env=nodes.environment(index, {"RAYLESS_WAIT": "30", **env}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )

    def do(self, action: str, **words: Any) -> Any:
        """The answer; what went wrong as an exception."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"do": action, **words}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]

    def call(self, method: str, *args: Any) -> list[Any]:
        """A call of the group."""
        result: list[Any] = self.do("call", method=method, args=args)
        return result

    def two_hosts(self) -> Driver:
        """Starts a rank on each host."""
        names = self.do("start", n=2, strategy="STRICT_SPREAD")
        assert sorted(names) == ["host0", "host1"]
        return self

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()


@contextmanager
def cluster_of(**flags: list[str]) -> Iterator[Nodes]:
    with hosts(2) as pair, Nodes(pair, {0: flags.get("a", []), 1: flags.get("b", [])}) as nodes:
        nodes.head(0)
        nodes.join(1)
        nodes.wait_alive(2)
        yield nodes


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with cluster_of() as nodes:
        yield nodes


def reasons(link: dict[str, Any]) -> dict[str, str]:
    return {rejected["transport"]: rejected["reason"] for rejected in link["rejected"]}


@needs_no_rdma
def test_between_hosts_it_is_tcp_and_everyone_says_why(nodes: Nodes) -> None:
    with Driver(nodes).two_hosts() as driver:
        assert driver.do("links") == []
        assert driver.call("open", 0, 1, 5) == ["open", "open"]
        assert driver.call("move", 0, 5, 70_000) == [True, True]
        until(lambda: [link["state"] for link in driver.do("links")] == ["open"], 20, "the driver hears of the link")
        (link,) = driver.do("links")
        assert (link["from"], link["to"], link["channel"], link["transport"]) == (0, 1, 5, "tcp")
        assert (link["device"], link["gid"], link["encrypted"], link["verified"]) == ("", "", False, False)
        assert "two hosts" in reasons(link)["shm"] and "host0" in reasons(link)["shm"]
        assert NO_DEVICE in reasons(link)["rdma"] and "node host0 and node host1" in reasons(link)["rdma"]
        for index in (0, 1):
            until(lambda index=index: len(nodes.links(index)) == 1, 20, "the head shows the link")
            (shown,) = nodes.links(index)
            assert {**shown, "messages": 0, "bytes": 0} == {**link, "messages": 0, "bytes": 0}
        until(lambda: nodes.links()[0]["bytes"] == 70_000, 20, "the message is counted")
        page = nodes.text("status")
        assert "no node has an RDMA device: tensors between hosts go over TCP" in page
        assert "0 -> 1 #5  tcp" in page and NO_DEVICE in page
        # Closed at both ends, it is gone everywhere, and the group goes on.
        driver.call("close", 5)
        until(lambda: driver.do("links") == [] and nodes.links() == [], 20, "the closed link is forgotten")
        assert driver.call("echo", "here") == ["here", "here"]


def test_on_one_host_it_is_shared_memory(nodes: Nodes) -> None:
    with Driver(nodes) as driver:
        assert driver.do("start", n=2, strategy="STRICT_PACK") == ["host0", "host0"]
        assert driver.call("open", 1, 0) == ["open", "open"]
        assert driver.call("move", 1, 0, 3 << 20) == [True, True]
        until(lambda: [link["transport"] for link in nodes.links()] == ["shm"], 20, "the head shows the link")
        (link,) = nodes.links()
        assert (link["from"], link["to"], link["state"], link["rejected"]) == (1, 0, "open", [])
        driver.do("stop")
        assert driver.do("links") == []
    until(lambda: nodes.links() == [], 20, "the links of a group end with it")


def test_a_daemon_and_a_head_that_come_back_know_the_links() -> None:
    with cluster_of() as nodes, Driver(nodes).two_hosts() as driver:
        assert driver.call("open", 0, 1) == ["open", "open"]
        assert driver.call("open", 1, 0, 1) == ["open", "open"]
        both = [(0, 1, 0), (1, 0, 1)]

        def shown() -> list[tuple[int, int, int]]:
            return [(link["from"], link["to"], link["channel"]) for link in nodes.links() if link["state"] == "open"]

        until(lambda: shown() == both, 20, "the head shows both links")
        nodes.kill(1)
        nodes.join(1)
        until(lambda: nodes.status()["nodes"][1]["incarnation"] == 2, 30, "the second life of host1 is there")
        until(lambda: shown() == both, 20, "its links are there again")
        nodes.kill(0)
        (nodes.run_dir(0) / "head-state").unlink(missing_ok=True)
        nodes.head(0)
        nodes.wait_alive(2)
        until(lambda: shown() == both, 20, "a head that remembers nothing is told of them")
        assert driver.call("move", 0, 0, 1000) == [True, True]


def test_shared_memory_between_hosts_is_refused_and_names_both(nodes: Nodes) -> None:
    with Driver(nodes, RAYLESS_TRANSPORT="shm").two_hosts() as driver:
        for told in driver.call("open", 0, 1):
            assert told.startswith("LinkUnavailableError: "), told
            assert "rank 0 is on node host0 and rank 1 on node host1, which are two hosts" in told, told
            assert "only shm is allowed (--transport, RAYLESS_TRANSPORT)" in told, told
            assert "\nhint: place both ranks on one host" in told, told
        until(lambda: [link["state"] for link in driver.do("links")] == ["failed"], 20, "the failure is shown")
        assert "two hosts" in driver.do("links")[0]["cause"]
        assert driver.call("echo", "usable") == ["usable", "usable"]


@needs_no_rdma
def test_rdma_without_devices_is_refused_with_the_diagnosis(nodes: Nodes) -> None:
    with Driver(nodes, RAYLESS_TRANSPORT="rdma", RAYLESS_ALLOW_TCP="1").two_hosts() as driver:
        for told in driver.call("open", 0, 1):
            assert f"rdma: node host0 and node host1: {NO_DEVICE}" in told, told
            assert "tcp: only rdma is allowed" in told and "\nhint: repair what is named above" in told, told


def test_a_value_that_is_none_is_refused_before_anything_starts(nodes: Nodes) -> None:
    with Driver(nodes, RAYLESS_TRANSPORT="ib") as driver, pytest.raises(RuntimeError) as told:
        driver.do("start", n=2)
    assert "RAYLESS_TRANSPORT=`ib` is not one of auto, rdma, shm, tcp\nhint: " in str(told.value)


def test_the_stricter_of_node_and_driver_wins_and_a_contradiction_names_both() -> None:
    flags = {"a": ["--transport", "tcp"], "b": ["--verify-links", "--encrypt-tensors"]}
    with cluster_of(**flags) as nodes:
        settings = [node["links"] for node in nodes.status()["nodes"]]
        assert [(each["transport"], each["verify_links"], each["encrypt_tensors"]) for each in settings] == [
            ("tcp", False, False),
            ("auto", True, True),
        ]
        with Driver(nodes).two_hosts() as driver:
            assert driver.call("open", 0, 1) == ["open", "open"]
            assert driver.call("move", 0, 0, 100_000) == [True, True]
            until(lambda: [link["state"] for link in nodes.links()] == ["open"], 20, "the head shows the link")
            (link,) = nodes.links()
            assert (link["transport"], link["encrypted"], link["verified"]) == ("tcp", True, True)
        with Driver(nodes, RAYLESS_TRANSPORT="shm") as driver, pytest.raises(RuntimeError) as told:
            driver.do("start", n=2, strategy="STRICT_SPREAD")
        assert "node host0 wants --transport tcp, the driver wants --transport shm" in str(told.value)


def test_hosts_that_are_named_as_one_share_memory() -> None:
    flags = {"a": ["--host-id", "rack-7"], "b": ["--host-id", "rack-7"]}
    with cluster_of(**flags) as nodes, Driver(nodes).two_hosts() as driver:
        assert driver.call("open", 0, 1) == ["open", "open"]
        assert driver.call("move", 0, 0, 1 << 20) == [True, True]
        until(lambda: [link["transport"] for link in nodes.links()] == ["shm"], 20, "the head shows the link")


@needs_no_rdma
def test_a_node_that_may_use_rdma_only_says_at_its_start_that_it_cannot() -> None:
    with hosts(1) as (host,), Nodes([host], {0: ["--transport", "rdma"]}) as nodes:
        started = host.run([*nodes.head_command(0), "--daemon"], env=nodes.environment(0))
        assert f"--transport rdma: no link of this node will come up: {NO_DEVICE}\n" in started.stderr
        (node,) = nodes.status()["nodes"]
        assert node["rdma"] == {"devices": [], "findings": [{"what": NO_DEVICE, "fatal": True}]}
