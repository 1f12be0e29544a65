"""Links over TCP on a wire that is slow, loses packets, or is cut: nothing is lost, nothing is wrong, and nothing hangs.

Both sides are real processes (`rayless bench link`), with a checksum over each payload (`--verify`).
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from wire import Wire, netns, unavailable, wired_hosts

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

TCP = ["--transport", "tcp", "--verify", "--json"]


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(subprocess.run(["rayless", "token", "new"], capture_output=True, text=True, check=True).stdout)
    return path


@contextlib.contextmanager
def listening(host: netns.Host, token: Path) -> Iterator[str]:
    """The other side of measurements; gives its address."""
    words = ["rayless", "bench", "link", "--listen", f"{host.address}:0", "--token-file", str(token)]
    child = host.popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout
    try:
        yield child.stdout.readline().decode().strip()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def measuring(host: netns.Host, address: str, token: Path, *more: str) -> subprocess.Popen[bytes]:
    words = ["rayless", "bench", "link", "--to", address, "--token-file", str(token), *TCP, *more]
    return host.popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_slow_network_that_loses_packets_slows_a_link_down_and_harms_nothing(token: Path) -> None:
    with wired_hosts(seed=5) as (a, b, wire), listening(b, token) as address:
        wire.set(loss=2, delay=2, jitter=2, reorder=2, duplicate=1, rate=200)
        words = ["--sizes", "1,28KiB,2MiB", "--streams", "3", "--seconds", "0.2"]
        out, err = measuring(a, address, token, *words).communicate(timeout=120)
        points = json.loads(out)["transports"][0]["points"]
        assert [point["bytes"] for point in points] == [1, 28 << 10, 2 << 20], err
        assert wire.counters()["ab"]["lost"] > 0 and wire.counters()["ba"]["lost"] > 0


def sent(wire: Wire) -> int:
    return wire.counters()["ab"]["offered"]


def test_a_cut_that_is_mended_costs_time_only(token: Path) -> None:
    with wired_hosts(seed=6) as (a, b, wire), listening(b, token) as address:
        child = measuring(a, address, token, "--sizes", "64KiB", "--seconds", "1")
        # In the midst of the measurement: the handshakes are some tens of packets.
        while sent(wire) < 1000:
            assert child.poll() is None
            time.sleep(0.001)
        wire.cut()
        while not wire.counters()["ab"]["cut"] and not wire.counters()["ba"]["cut"]:
            assert child.poll() is None
            time.sleep(0.001)
        wire.mend()
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        assert json.loads(out)["transports"][0]["points"][0]["hops"] >= 5


def test_a_cut_for_good_ends_a_wait_at_its_limit_with_the_links_name(token: Path) -> None:
    with wired_hosts(seed=7) as (a, b, wire), listening(b, token) as address:
        child = measuring(a, address, token, "--sizes", "1MiB", "--seconds", "30", "--stall", "1")
        while sent(wire) < 1000:
            assert child.poll() is None
            time.sleep(0.001)
        wire.cut()
        assert child.stderr
        assert select.select([child.stderr], [], [], 60)[0], "it hangs"
        _, err = child.communicate(timeout=60)
        assert child.returncode == 1
        assert err.decode().startswith("error: link ") and "timed out" in err.decode(), err
