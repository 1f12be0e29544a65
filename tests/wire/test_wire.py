"""The wire does what the failure tests ask of it. Counts are compared, never times."""

from __future__ import annotations

import itertools
import os
import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from wire import Wire, netns, unavailable, wired_hosts

T = TypeVar("T")

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture
def hosts() -> Iterator[tuple[netns.Host, netns.Host, Wire]]:
    with wired_hosts(seed=3) as joined:
        yield joined


def on(host: netns.Host, action: Callable[[], T]) -> T:
    """Runs `action` with this host's network; sockets made there stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{host.namespace}", os.O_RDONLY)
    try:
        _setns(there)
        return action()
    finally:
        _setns(home)
        os.close(there)
        os.close(home)


def _setns(fd: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def udp(host: netns.Host) -> socket.socket:
    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        # Never fragmented: what is too long vanishes whole.
        made.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER = IP_PMTUDISC_DO
        made.bind((host.address, 0))
        return made

    return on(host, make)


def arrivals(
    sender: socket.socket, receiver: socket.socket, payloads: list[bytes], wire: Wire, way: str
) -> list[bytes]:
    """Sends all, and collects what arrives until the wire has nothing more under way."""
    got: list[bytes] = []
    before = wire.counters()[way]
    for payload in payloads:
        sender.sendto(payload, receiver.getsockname())
        while select.select([receiver], [], [], 0)[0]:
            got.append(receiver.recv(65536))
    while True:
        after = wire.counters()[way]
        change = {key: after[key] - before[key] for key in after}
        gone = change["lost"] + change["cut"] + change["too_long"] + change["no_room"]
        if change["offered"] == len(payloads) and change["delivered"] == len(payloads) - gone + change["duplicated"]:
            while len(got) < change["delivered"] and select.select([receiver], [], [], 5)[0]:
                got.append(receiver.recv(65536))
            return got
        if select.select([receiver], [], [], 0.01)[0]:
            got.append(receiver.recv(65536))


def numbered(count: int, size: int = 8) -> list[bytes]:
    return [n.to_bytes(4, "little").ljust(size, b".") for n in range(count)]


def test_a_perfect_wire_loses_nothing_and_keeps_the_order(hosts: tuple[netns.Host, netns.Host, Wire]) -> None:
    a, b, wire = hosts
    with udp(a) as near, udp(b) as far:
        assert arrivals(near, far, numbered(500), wire, "ab") == numbered(500)
        assert arrivals(far, near, numbered(500), wire, "ba") == numbered(500)


def test_loss_is_near_what_was_asked_for_and_the_same_for_the_same_seed() -> None:
    seen = []
    for _ in range(2):
        with wired_hosts(seed=11) as (a, b, wire):
            wire.set(loss=30)
            with udp(a) as near, udp(b) as far:
                seen.append(arrivals(near, far, numbered(1000), wire, "ab"))
    assert seen[0] == seen[1]
    assert 600 < len(seen[0]) < 800


def test_a_one_way_cut_is_one_way(hosts: tuple[netns.Host, netns.Host, Wire]) -> None:
    a, b, wire = hosts
    with udp(a) as near, udp(b) as far:
        wire.cut("ab")
        assert arrivals(near, far, numbered(20), wire, "ab") == []
        assert len(arrivals(far, near, numbered(20), wire, "ba")) == 20
        wire.mend("ab")
        assert len(arrivals(near, far, numbered(20), wire, "ab")) == 20


def test_reordering_and_duplicates_lose_nothing(hosts: tuple[netns.Host, netns.Host, Wire]) -> None:
    a, b, wire = hosts
    with udp(a) as near, udp(b) as far:
        wire.set(reorder=20, duplicate=10, hold=3)
        got = arrivals(near, far, numbered(500), wire, "ab")
    assert set(got) == set(numbered(500))
    assert len(got) > 500
    assert any(first > second for first, second in itertools.pairwise(int.from_bytes(p[:4], "little") for p in got))


def test_an_mtu_hole_swallows_long_packets_silently(hosts: tuple[netns.Host, netns.Host, Wire]) -> None:
    a, b, wire = hosts
    wire.set(mtu=600)
    with udp(a) as near, udp(b) as far:
        assert arrivals(near, far, numbered(10, 1000) + numbered(5, 500), wire, "ab") == numbered(5, 500)


def test_tcp_gets_through_loss_delay_and_flapping(hosts: tuple[netns.Host, netns.Host, Wire], tmp_path: Path) -> None:
    a, b, wire = hosts
    wire.set(loss=3, delay=5, jitter=3, reorder=2, flap="200/50")
    payload = os.urandom(300_000)

    def listen() -> socket.socket:
        return socket.create_server((b.address, 0))

    with on(b, listen) as server:
        source = tmp_path / "payload"
        source.write_bytes(payload)
        script = "import socket,sys; s=socket.create_connection((sys.argv[1],int(sys.argv[2]))); s.sendall(open(sys.argv[3],'rb').read())"
        port = str(server.getsockname()[1])
        a.popen(["python3", "-c", script, b.address, port, os.fspath(source)])
        accepted, _ = server.accept()
        with accepted, accepted.makefile("rb") as stream:
            assert stream.read() == payload
    assert wire.counters()["ab"]["lost"] > 0


def test_a_wrong_rule_changes_nothing(hosts: tuple[netns.Host, netns.Host, Wire]) -> None:
    a, b, wire = hosts
    with pytest.raises(ValueError, match="loss=200"):
        wire.set(cut=True, loss=200)
    with udp(a) as near, udp(b) as far:
        assert len(arrivals(near, far, numbered(5), wire, "ab")) == 5


def test_nothing_is_left_behind() -> None:
    with wired_hosts() as (a, b, wire):
        pid, names = wire.pid, [a.namespace, b.namespace]
    assert not Path(f"/proc/{pid}").exists()
    listed = subprocess.run([*netns.ip_command(), "netns", "list"], capture_output=True, text=True).stdout
    assert not any(str(name) in listed for name in names)
