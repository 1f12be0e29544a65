"""What somebody without the token gets: nothing, while a group works on undisturbed."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import select
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stage import Stage

pytestmark = pytest.mark.quick
PORT = 6379


@pytest.fixture
def working(stages: Callable[..., Stage]) -> Iterator[Stage]:
    """A stage with a group that is called all the time; it must not notice anything."""
    stage = stages()
    try:
        stage.start()
        stage.driver.do("steps", period=0.005, size=2048)
        yield stage
        stage.driver.do("enough")
        stepped = stage.driver.wait("stepped")
        assert stepped["ok"], stepped
        assert stepped["count"] > 0
        stage.driver.ask("stop", "stopped")
        stage.wait_alive(0)
        assert stage.leftovers() == []
    except BaseException:
        stages(give_up=True)
        raise


def test_one_port_is_open_and_files_are_private(working: Stage) -> None:
    for index, host in enumerate((working.a, working.b)):
        sockets = host.run(["cat", "/proc/self/net/tcp", "/proc/self/net/tcp6"]).stdout.splitlines()
        listening = [line.split()[1] for line in sockets if " 0A " in line]
        ports = {int(address.split(":")[1], 16) for address in listening}
        outside = {a for a in listening if not a.startswith("0100007F")}
        assert {int(a.split(":")[1], 16) for a in outside} == {PORT}, listening
        assert PORT in ports
        run_dir = working.cluster.run_dir(index)
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        for path in run_dir.rglob("*"):
            mode = stat.S_IMODE(path.lstat().st_mode)
            assert mode & 0o077 == 0, f"{path} has mode {mode:o}"


def test_open_ports_are_those_of_the_threat_model(working: Stage) -> None:
    """Every socket on which anybody could call, by process, while a group works: the table of docs/threat-model.md."""
    found = set()
    for index, host in enumerate((working.a, working.b)):
        daemon = working.cluster.daemon_pid(index)
        known = {daemon: "head" if index == 0 else "node daemon", working.driver.process.pid: "driver"}
        known |= {
            int(file.read_text()): "keeper" for file in (working.cluster.run_dir(index) / "keepers").glob("*.pid")
        }
        known |= {process.pid: "worker" for process in working.processes if process.what.startswith("worker")}
        rows = host.run(["ss", "-Hanptu"]).stdout.splitlines()
        rows += [f"u_str {row}" for row in host.run(["ss", "-Hxlp"]).stdout.splitlines()]
        for row in rows:
            pids = [int(pid) for pid in re.findall(r"pid=(\d+)", row)]
            kind, state, local = row.split()[0], row.split()[1], row.split()[4]
            if not any(pid in known for pid in pids) or (kind == "tcp" and state != "LISTEN"):
                continue
            name = known[next(pid for pid in pids if pid in known)]
            if kind.startswith("u_"):
                place = re.sub(r"[0-9a-f]{16}", "GROUP", row.split()[5].rsplit("/host", 1)[-1].split("/", 1)[-1])
                found.add((name, "Unix socket, 0600", f"`{place}` in the run dir"))
                continue
            address, port = local.rsplit(":", 1)
            address = "its address" if address.strip("[]") == host.address else address
            # A socket that calls the head has a port of the kernel's choice.
            port = port if int(port) == PORT else "a port of the kernel's"
            found.add((name, kind.upper(), f"{address}, {port}"))
    table = "\n".join(f"| {' | '.join(row)} |" for row in sorted(found))
    page = Path(__file__).parents[2] / "docs" / "threat-model.md"
    text = page.read_text()
    head = "| process | kind | where |\n|---|---|---|\n"
    before, _, rest = text.partition(head)
    shown, _, after = rest.partition("\n\n")
    if os.environ.get("RAYLESS_WRITE_PAGES"):
        page.write_text(f"{before}{head}{table}\n\n{after}")
        return
    assert shown == table, f"open now:\n{table}\nhint: RAYLESS_WRITE_PAGES=1 writes it into {page}"


def test_nobody_gets_more_than_three_times_what_it_sent(working: Stage) -> None:
    """A sender's address may be forged: what a port answers to a stranger must not be worth the forging."""
    noise = random.Random(5)
    with working.b.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.connect((working.a.address, PORT))
        for version in (b"\x00\x00\x00\x01", b"\x0a\x1a\x2a\x3a", b"\xff\x00\x00\x1d"):
            for length in (21, 200, 1199, 1200, 1400):
                ids = bytes([8]) + noise.randbytes(8) + bytes([8]) + noise.randbytes(8)
                packet = b"\xc3" + version + ids + b"\x00" + noise.randbytes(1400)
                answered = 0
                with contextlib.suppress(ConnectionRefusedError):
                    udp.send(packet[:length])
                while select.select([udp], [], [], 0.2)[0]:
                    with contextlib.suppress(ConnectionRefusedError):
                        answered += len(udp.recv(65536))
                assert answered <= 3 * length, f"{answered} bytes for {length} of version {version.hex()}"


def test_the_token_is_nowhere_to_be_read(working: Stage) -> None:
    token = working.cluster.token_file.read_text().strip().encode()
    secret = token.removeprefix(b"rl1_")
    seen = 0
    for host in (working.a, working.b):
        for pid in host.pids():
            for name in ("cmdline", "environ"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    assert secret not in Path(f"/proc/{pid}/{name}").read_bytes(), f"{name} of {pid}"
                    seen += 1
    assert seen > 10
    for index in (0, 1):
        for path in working.cluster.run_dir(index).rglob("*"):
            if path.is_file() and path.name != "token":
                assert secret not in path.read_bytes(), path
        assert secret.decode() not in str(working.cluster.status(index))


def test_another_token_gets_nobody_in(working: Stage) -> None:
    cluster = working.cluster
    other = cluster.base / "other-token"
    made = subprocess.run([cluster.rayless, "token", "new"], capture_output=True, text=True, check=True)
    other.write_text(made.stdout)
    other.chmod(0o600)
    stranger = cluster.base / "stranger"
    join = [
        cluster.rayless,
        "join",
        f"{working.a.address}:{PORT}",
        "--run-dir",
        str(stranger),
        "--port",
        "7000",
        "--name",
        "stranger",
    ]
    refused = working.b.run([*join, "--token-file", str(other)], env=cluster.environment(1), check=False, timeout=20)
    assert refused.returncode == 4, refused
    assert "another cluster token" in refused.stderr
    assert "hint: " in refused.stderr
    other.write_text("rl1_" + "0" * 32 + "\n")
    malformed = working.b.run([*join, "--token-file", str(other)], env=cluster.environment(1), check=False, timeout=20)
    assert malformed.returncode == 4, malformed
    assert "stranger" not in working.states()


def test_noise_on_both_ports_is_dropped(working: Stage) -> None:
    noise = random.Random(4)
    where = (working.a.address, PORT)
    with working.b.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for _ in range(2000):
            first = noise.choice([b"\xc0\x00\x00\x00\x01", b"\x40", b"", b"\xff"])
            with contextlib.suppress(ConnectionRefusedError, BlockingIOError):
                udp.sendto(first + noise.randbytes(noise.randrange(1400)), where)
        for opening in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x80\x04\x95",
            b"\x16\x03\x01\xff\xff",
            noise.randbytes(5000),
            b"",
        ):
            with socket.create_connection(where, timeout=20) as tcp:
                with contextlib.suppress(OSError):
                    tcp.sendall(opening)
                    tcp.shutdown(socket.SHUT_WR)
                # Closed without an answer.
                with contextlib.suppress(ConnectionResetError):
                    assert tcp.recv(1) == b""


def test_ten_thousand_callers_who_say_nothing_keep_nobody_out(working: Stage) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(10_000, hard - 500)
    with contextlib.ExitStack() as held:
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (count + 500, hard))
        with working.b.entered():
            for number in range(count):
                caller = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                caller.setblocking(False)
                caller.connect_ex((working.a.address, PORT))
                # Every other one begins a handshake and falls silent.
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    if number % 2 and ready(caller):
                        caller.send(b"\x16\x03\x01")
        # In the middle of it a group is stopped and another one started, with a session to the other host's keeper.
        working.driver.do("enough")
        assert working.driver.wait("stepped")["ok"]
        working.driver.ask("stop", "stopped")
        working.start()
        working.driver.do("steps", period=0.005, size=2048)
        # The limits of the head held, not this test's.
        open_now = len(os.listdir(f"/proc/{working.cluster.daemon_pid(0)}/fd"))
        assert open_now < 400, f"{open_now} descriptors are open in the head"


def ready(caller: socket.socket) -> bool:
    """Whether its connection was taken (or refused) by now."""
    poll = select.poll()
    poll.register(caller, select.POLLOUT)
    return bool(poll.poll(200))
