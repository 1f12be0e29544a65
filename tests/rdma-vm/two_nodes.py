"""In the guest: two node daemons on its two devices of a kind, a group across them, and what they say of its links.

    python tests/rdma-vm/two_nodes.py rxe siw

Both "hosts" are addresses of this one guest (rxe does not work in a network namespace of its own), told apart by --host-id.
Run by tests/rdma-vm/nodes. Emulated: no time is asserted.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "python")]

from netns import Host
from serving import until
from test_transport import Driver, Nodes, reasons

#: Kind: addresses of its two devices, the protocol that they speak, the MTU that tests/rdma-vm/guest-init gives them.
KINDS = {
    "rxe": (("10.77.0.1", "10.77.0.2"), "roce", 4200),
    "siw": (("10.78.0.1", "10.78.0.2"), "iwarp", 9000),
}


class Around(Nodes):
    """The second daemon is started by a command around its own."""

    around: Sequence[str] = ()

    def join_command(self, index: int, head: int = 0) -> list[str]:
        return [*self.around, *super().join_command(index, head)]


@contextmanager
def nodes(addresses: tuple[str, str], *flags: list[str], around: Sequence[str] = ()) -> Iterator[Nodes]:
    """Two daemons with these flags."""
    pair = [Host(None, address, "") for address in addresses]
    own = {index: ["--host-id", f"guest-{index}", *flags[index]] for index in range(2)}
    with Around(pair, own) as made:
        made.around = around
        made._dead_after = 60  # The emulated clock may stand still for seconds.
        made.head(0)
        made.join(1)
        made.wait_alive(2, 120)
        yield made
    for host in pair:
        host.close()


def linked(driver: Driver, sender: int, channel: int) -> dict[str, Any]:
    """Opens a link, moves messages of one chunk and of many over it, and gives what the driver knows of it."""
    said = driver.call("open", sender, 1 - sender, channel, 60)
    assert said == ["open", "open"], said
    for size in (28 << 10, 3_000_000):
        assert driver.call("move", sender, channel, size) == [True, True], size

    def mine() -> list[dict[str, Any]]:
        return [link for link in driver.do("links") if link["channel"] == channel and link["state"] == "open"]

    until(lambda: bool(mine()), 60, "the driver hears of the link")
    return mine()[0]


def a_group_is_linked_over_the_devices_of_a_kind(kind: str) -> None:
    addresses, protocol, mtu = KINDS[kind]
    with nodes(addresses, ["--rdma-device", f"{kind}0"], ["--rdma-device", f"{kind}1"]) as made:
        for node in made.status()["nodes"]:
            rdma = node["rdma"]
            assert rdma["findings"] == [], rdma
            shown = next(device for device in rdma["devices"] if device["name"].startswith(kind))
            port = shown["ports"][0]
            assert (port["state"], port["mtu"], shown["protocol"]) == ("ACTIVE", mtu, protocol), shown
        with Driver(made, RAYLESS_WAIT="120").two_hosts() as driver:
            for sender in (0, 1):
                link = linked(driver, sender, sender)
                assert link["transport"] == "rdma", link
                # The sender's device and the receiver's.
                assert (link["device"], link["peer_device"]) == (f"{kind}{sender}", f"{kind}{1 - sender}"), link
                assert link["gid"] and link["mtu"] > 0, link
                assert list(reasons(link)) == ["shm"] and "two hosts" in reasons(link)["shm"], link
        print(f"{kind}: linked both ways", flush=True)


def devices_that_cannot_talk_are_named_and_tcp_takes_a_flag() -> None:
    roce, iwarp = KINDS["rxe"][0][0], KINDS["siw"][0][1]
    mixed = (["--rdma-device", "rxe0"], ["--rdma-device", "siw1"])
    with nodes((roce, iwarp), *mixed) as made, Driver(made, RAYLESS_WAIT="120").two_hosts() as driver:
        for said in driver.call("open", 0, 1, 0, 60):
            assert "no two devices can talk" in said and "rxe0 (roce" in said and "siw1 (iwarp" in said, said
            assert "TCP takes --allow-tcp" in said, said
    allowed = [*mixed[0], "--allow-tcp"]
    with nodes((roce, iwarp), allowed, mixed[1]) as made, Driver(made, RAYLESS_WAIT="120").two_hosts() as driver:
        link = linked(driver, 0, 0)
        assert link["transport"] == "tcp" and "no two devices can talk" in reasons(link)["rdma"], link
    print("rxe with siw: refused, or TCP where that is allowed", flush=True)


def a_memlock_limit_that_is_too_small_is_named() -> None:
    # Root has CAP_IPC_LOCK, which lifts the limit, so it is taken away, too.
    small = (
        "bash",
        "-c",
        'ulimit -l 64; exec "$@"',
        "-",
        "setpriv",
        "--bounding-set",
        "-ipc_lock",
        "--inh-caps",
        "-ipc_lock",
    )
    addresses = KINDS["siw"][0]
    with nodes(addresses, [], ["--transport", "rdma"], around=small) as made:
        (finding,) = made.status()["nodes"][1]["rdma"]["findings"]
        what = "the memlock limit is 64 KiB and CAP_IPC_LOCK is missing; RDMA needs it unlimited"
        assert finding["fatal"] and finding["what"].startswith(what), finding
        with Driver(made, RAYLESS_WAIT="120").two_hosts() as driver:
            for said in driver.call("open", 0, 1, 0, 60):
                assert f"rdma: node host1: {what}" in said and "tcp: only rdma is allowed" in said, said
    print("a small memlock limit: named, and no link over anything else", flush=True)


def device_files_that_are_not_there_are_named() -> None:
    hidden = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/infiniband && exec "$@"', "-")
    with nodes(KINDS["siw"][0], [], [], around=hidden) as made:
        there, missing = (node["rdma"]["findings"] for node in made.status()["nodes"])
        files = [finding["what"].split(" cannot be opened: ")[0] for finding in missing]
        assert (there, files) == ([], ["/dev/infiniband/uverbs0", "/dev/infiniband/rdma_cm"]), missing
    print("hidden device files: named", flush=True)


def an_unknown_device_is_named_with_those_that_there_are() -> None:
    from serving import rayless_command

    words = [rayless_command(), "head", "--port", "0", "--rdma-device", "nosuch", "--run-dir", "/var/tmp/never-made"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "nosuch" in done.stderr and "rxe0" in done.stderr, done


def main() -> None:
    an_unknown_device_is_named_with_those_that_there_are()
    for kind in sys.argv[1:]:
        a_group_is_linked_over_the_devices_of_a_kind(kind)
    if set(sys.argv[1:]) == set(KINDS):
        devices_that_cannot_talk_are_named_and_tcp_takes_a_flag()
    if "siw" in sys.argv[1:]:
        a_memlock_limit_that_is_too_small_is_named()
        device_files_that_are_not_there_are_named()


if __name__ == "__main__":
    main()
