"""Two hosts joined by a wire that a test can damage while it runs.

    with wired_hosts() as (a, b, wire):
        wire.set(loss=30)                       # both directions; percent, milliseconds, bytes, Mbit/s
        wire.set("ab", cut=True)                # one way only: what a sends does not arrive at b
        wire.clear()

The wire is `rayless-test-wire` (this folder, built on first use), a small process between two TUN devices: it needs neither netem nor
anything but /dev/net/tun and root. What it loses depends on the seed and on the packets only.

Its own cost, on a machine of two cores (a veth pair in brackets): a round trip of 64 bytes 29 us (17 us); one TCP stream 1.4 Gbit/s at
MTU 1500, 4.2 at 9000, 11 at 65000 (13); no CPU at all while no packet moves.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import netns


class Wire:
    """The running wire. `a` is the first host, `b` the second."""

    def __init__(self, a: netns.Host, b: netns.Host, *, mtu: int = 1500, seed: int = 1) -> None:
        assert a.namespace and b.namespace
        self.mtu = mtu
        self._process = subprocess.Popen(
            [binary(), a.namespace, b.namespace, str(mtu), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        answer = self._read()
        if answer != "ready":
            self.close()
            raise RuntimeError(f"the wire did not start: {answer}")
        for host in (a, b):
            # A queue longer than a burst of TCP, and no router solicitations among the packets that are counted.
            for words in (["mtu", str(mtu)], ["txqueuelen", "2000"], ["addrgenmode", "none"]):
                subprocess.run([*netns.ip_command(), "-n", host.namespace, "link", "set", "eth0", *words], check=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def set(self, direction: str = "both", **rule: object) -> None:
        """Changes the rule of a direction ("ab", "ba", "both"); what is not named stays.

        loss, duplicate, reorder (%) · hold, delay, jitter (ms) · mtu (bytes, 0 = none) · rate (Mbit/s, 0 = none) ·
        cut (bool) · flap ("UP/DOWN" in ms, "0/0" = none)."""
        words = [f"{key}={_text(value)}" for key, value in rule.items()]
        self._ask(" ".join(["set", direction, *words]))

    def cut(self, direction: str = "both") -> None:
        """Nothing passes any more in this direction; nobody is told."""
        self.set(direction, cut=True)

    def mend(self, direction: str = "both") -> None:
        """Undoes `cut`; other damage stays."""
        self.set(direction, cut=False)

    def clear(self) -> None:
        """A perfect wire again."""
        self._ask("clear")

    def ahead(self) -> None:
        """From now on it runs ahead of every ordinary process: a cable needs no CPU, so what saturates the cores must not make this one
        slow. Raises `PermissionError` where that is not allowed."""
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            os.sched_setscheduler(int(thread), os.SCHED_RR, os.sched_param(2))

    def counters(self) -> dict[str, dict[str, int]]:
        """What became of the packets so far, by direction: offered, delivered, bytes, lost, cut, too_long, no_room, duplicated, reordered."""
        counted: dict[str, dict[str, int]] = json.loads(self._command("counters"))
        return counted

    def close(self) -> None:
        """Takes the wire away, and both interfaces with it."""
        process = self._process
        if process.stdin:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()

    def _ask(self, line: str) -> None:
        answer = self._command(line)
        if answer != "ok":
            raise ValueError(answer)

    def _command(self, line: str) -> str:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout and self._process.stderr
        line = self._process.stdout.readline()
        return line.strip() if line else self._process.stderr.read().strip() or "the wire ended"


def _text(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


@contextlib.contextmanager
def wired_hosts(*, mtu: int = 1500, seed: int = 1) -> Iterator[tuple[netns.Host, netns.Host, Wire]]:
    """Two hosts and the wire between them; all gone at the end, with all that ran on them."""
    made: list[Wire] = []

    def cable(a: netns.Host, b: netns.Host) -> None:
        made.append(Wire(a, b, mtu=mtu, seed=seed))

    try:
        with netns.hosts(2, cable=cable) as (a, b):
            yield a, b, made[0]
    finally:
        for wire in made:
            wire.close()


def unavailable() -> str | None:
    """Why there can be no wire here; None when there can."""
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no access to /dev/net/tun"
    return netns.unavailable()


@functools.cache
def binary() -> str:
    """Path of the wire's program, built when it is missing or older than its source; RAYLESS_TEST_WIRE names one that was built elsewhere."""
    if built_elsewhere := os.environ.get("RAYLESS_TEST_WIRE"):
        return built_elsewhere
    command = ["cargo", "build", "--quiet", "--package", "rayless-test-wire", "--message-format", "json"]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    messages: list[dict[str, Any]] = [json.loads(line) for line in built.stdout.splitlines()]
    return str(next(m["executable"] for m in messages if m.get("executable")))
