"""Several "hosts" on one machine: network namespaces joined by veth pairs.

    with hosts(2) as (a, b):
        a.popen(["rayless", "head", ...]);  b.popen(["rayless", "join", f"{a.address}:6379", ...])

Each host has its own network stack (interface ``eth0``, loopback up), so what one host binds the other
one cannot take, and a link can be cut. Names carry the pid and a random part: two runs never meet. On the
way out, also after an exception, SIGTERM or an ordinary exit, whatever still runs *inside* the namespaces
is killed and they are removed. Nothing else on the machine is touched.

Where namespaces are not permitted ``unavailable()`` says why, and ``hosts(n, loopback=True)`` gives hosts
that are addresses of the loopback range instead.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

PREFIX = "rayless"


class Host:
    """One host: a network namespace, or (``namespace is None``) an address of the loopback range."""

    def __init__(self, namespace: str | None, address: str, interface: str) -> None:
        self.namespace = namespace
        self.address = address
        self.interface = interface
        self._children: list[subprocess.Popen[Any]] = []

    def argv(self, command: Sequence[str | os.PathLike[str]]) -> list[str]:
        """The command line that runs ``command`` on this host."""
        words = [os.fspath(word) for word in command]
        if self.namespace is None:
            return words
        # `ip` execs the command: the pid of the child is the pid of the command.
        return [*ip_command(), "netns", "exec", self.namespace, *words]

    def popen(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = subprocess.STDOUT,
        cwd: str | os.PathLike[str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a command here, in a session of its own; it ends with this host at the latest."""
        child = subprocess.Popen(
            self.argv(command),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            start_new_session=True,
        )
        self._children.append(child)
        return child

    def run(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command here to its end and returns its output as text."""
        done = subprocess.run(
            self.argv(command), env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sockets that this thread opens inside the block belong to this host; those of other threads do not."""
        if self.namespace is None:
            yield
            return
        with open("/proc/thread-self/ns/net") as own, open(f"/run/netns/{self.namespace}") as there:
            _setns(there.fileno())
            try:
                yield
            finally:
                _setns(own.fileno())

    def pids(self) -> list[int]:
        """The processes that run inside the namespace (a loopback host has no list of its own)."""
        if self.namespace is None:
            return [child.pid for child in self._children if child.poll() is None]
        listed = subprocess.run([*ip_command(), "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def cut(self) -> None:
        """Takes the link down: packets vanish, as when a cable is pulled."""
        self._link("down")

    def mend(self) -> None:
        """Brings the link back."""
        self._link("up")

    def _link(self, state: str) -> None:
        if self.namespace is None:
            raise RuntimeError("a loopback host has no link of its own to cut")
        _ip("-n", self.namespace, "link", "set", self.interface, state)

    def close(self) -> None:
        """Kills what still runs on this host."""
        for child in self._children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        for child in self._children:
            child.wait()
        self._children.clear()
        deadline = time.monotonic() + 10
        while self.namespace is not None and (left := self.pids()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def ip_command() -> list[str]:
    """``ip``; Debian keeps it in a folder that is not on everybody's PATH."""
    return [next((p for p in ("/usr/sbin/ip", "/sbin/ip", "/usr/bin/ip") if os.access(p, os.X_OK)), "ip")]


def unavailable() -> str | None:
    """Why network namespaces cannot be made here; None when they can."""
    if os.geteuid() != 0:
        return "making network namespaces takes root"
    probe = f"{PREFIX}-{os.getpid()}-{secrets.token_hex(3)}-probe"
    try:
        made = subprocess.run([*ip_command(), "netns", "add", probe], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no `ip` command (apt-get install iproute2)"
    if made.returncode != 0:
        return f"network namespaces are not permitted here: {made.stderr.strip()}"
    try:
        peer = f"rlp{secrets.token_hex(4)}"
        veth = [*ip_command(), "-n", probe, "link", "add", "eth0", "type", "veth", "peer", "name", peer]
        linked = subprocess.run(veth, capture_output=True, text=True)
        return None if linked.returncode == 0 else f"veth pairs are not permitted here: {linked.stderr.strip()}"
    finally:
        subprocess.run([*ip_command(), "netns", "del", probe], capture_output=True)


@contextlib.contextmanager
def hosts(
    count: int = 2, *, loopback: bool = False, cable: Callable[[Host, Host], None] | None = None
) -> Iterator[list[Host]]:
    """``count`` hosts that reach each other; all gone at the end, with all that ran on them.

    ``cable`` makes ``eth0`` in both of two hosts in place of the veth pair (tests/wire: a cable that loses packets)."""
    _terminate_by_exception()
    made = _loopback_hosts(count) if loopback else _namespace_hosts(count, cable)
    cleanup = _Cleanup(made)
    atexit.register(cleanup)
    try:
        yield made[:count]
    finally:
        cleanup()
        atexit.unregister(cleanup)


class _Cleanup:
    def __init__(self, made: list[Host]) -> None:
        self._made = made

    def __call__(self) -> None:
        for host in self._made:
            host.close()
        for host in self._made:
            if host.namespace is not None:
                subprocess.run([*ip_command(), "netns", "del", host.namespace], capture_output=True)
        self._made.clear()


def _loopback_hosts(count: int) -> list[Host]:
    third, fourth = secrets.randbelow(250) + 2, secrets.randbelow(200) + 2
    return [Host(None, f"127.{third}.{fourth}.{index + 1}", "lo") for index in range(count)]


def _namespace_hosts(count: int, cable: Callable[[Host, Host], None] | None = None) -> list[Host]:
    """The hosts, and behind them the namespace of the bridge that joins more than two."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    _sweep()
    run = f"{PREFIX}-{os.getpid()}-{secrets.token_hex(3)}"
    network = f"10.{secrets.randbelow(200) + 30}.{secrets.randbelow(250) + 1}"
    interface = "eth0" if count > 1 else "lo"
    made = [Host(f"{run}-{index}", f"{network}.{index + 1}", interface) for index in range(count)]
    hub = Host(f"{run}-hub", "", "br0") if count > 2 else None
    everything = [*made, hub] if hub else made
    try:
        for host in everything:
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        if hub:
            _ip("-n", hub.namespace, "link", "add", "br0", "type", "bridge")
            _ip("-n", hub.namespace, "link", "set", "br0", "up")
            for index, host in enumerate(made):
                _veth(hub.namespace, f"p{index}", host.namespace)
                _ip("-n", hub.namespace, "link", "set", f"p{index}", "master", "br0", "up")
        elif count == 2 and cable is not None:
            cable(made[0], made[1])
        elif count == 2:
            _veth(made[0].namespace, "eth0", made[1].namespace)
        for host in made:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.namespace, "link", "set", host.interface, "up")
    except BaseException:
        _Cleanup(list(everything))()
        raise
    return everything


def _veth(here: str | None, name: str, there: str | None) -> None:
    """A cable from interface ``name`` of one namespace to ``eth0`` of another."""
    _ip("-n", here, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", there)


def _ip(*words: str | None) -> None:
    done = subprocess.run([*ip_command(), *[str(word) for word in words]], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(map(str, words))}: {done.stderr.strip()}")


def _setns(namespace: int) -> None:
    """Moves the calling thread to a network namespace (``os.setns`` came with Python 3.12)."""
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newnet = 0x40000000
    if libc.setns(namespace, clone_newnet) != 0:
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace")


def _sweep() -> None:
    """Removes the empty namespaces of a run of ours that was killed before it could clean up."""
    for path in Path("/run/netns").glob(f"{PREFIX}-*-*-*"):
        owner = path.name.split("-")[1]
        if not owner.isdigit() or Path(f"/proc/{owner}").exists():
            continue
        inside = subprocess.run([*ip_command(), "netns", "pids", path.name], capture_output=True, text=True)
        if inside.returncode == 0 and not inside.stdout.split():
            subprocess.run([*ip_command(), "netns", "del", path.name], capture_output=True)


def _terminate_by_exception() -> None:
    """Makes SIGTERM unwind the stack, so that the clean-up runs."""

    def ended(signum: int, _frame: object) -> None:
        sys.exit(128 + signum)

    with contextlib.suppress(ValueError):  # not the main thread: whoever owns it decides
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, ended)
