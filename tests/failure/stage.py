"""Two hosts on a damaged wire with a daemon each, and a driver: where every cell of the failure matrix plays."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "wire")]

from serving import Cluster
from wire import Wire, netns, wired_hosts

#: Nothing that works takes as long; what does is a hang.
HANG = 40.0
Event = dict[str, Any]


class Hang(Exception):
    """Something that was waited for did not come."""


class Process:
    """A process that was seen alive; its end is told by the kernel."""

    def __init__(self, pid: int, what: str) -> None:
        self.pid = pid
        self.what = what
        self._fd = os.pidfd_open(pid)

    def signal(self, number: int) -> float:
        """Sends a signal and returns when."""
        now = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)
        return now

    def gone(self, timeout: float) -> bool:
        return bool(select.select([self._fd], [], [], max(0.0, timeout))[0])

    def close(self) -> None:
        os.close(self._fd)


class Saturation:
    """Eight busy loops a core at normal priority, shared by all who ask for them at the same time."""

    #: Processes like this one that ask for them at the same time, too: each starts its share.
    sharers = 1

    #: Ends with the test that started it, however that ends (PR_SET_PDEATHSIG of SIGKILL).
    LOOP = "import ctypes\nctypes.CDLL(None).prctl(1, 9)\nwhile True: pass"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._askers = 0
        self._loops: list[subprocess.Popen[bytes]] = []

    def begin(self) -> None:
        with self._lock:
            self._askers += 1
            if self._askers > 1:
                return
            # A session each: where Linux weighs sessions against each other (sched_autogroup), loops that share one would have
            # together what a single daemon has. The signal at the parent's end is sent when the *thread* ends that started
            # them, so one that lives as long as the process does it.
            self._loops = _keeper_of_loops.submit(self._start).result()

    def _start(self) -> list[subprocess.Popen[bytes]]:
        command = [sys.executable, "-c", self.LOOP]
        count = -(-8 * (os.cpu_count() or 1) // self.sharers)
        return [subprocess.Popen(command, start_new_session=True) for _ in range(count)]

    def end(self) -> None:
        with self._lock:
            self._askers -= 1
            if self._askers:
                return
            for each in self._loops:
                each.kill()
            for each in self._loops:
                each.wait()
            self._loops = []


_keeper_of_loops = ThreadPoolExecutor(1)
saturation = Saturation()


class Driver:
    """`driver.py` on a host."""

    def __init__(self, host: netns.Host, env: dict[str, str], log: Path) -> None:
        command = host.argv([sys.executable, str(HERE / "driver.py")])
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            command,
            env=env,
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        assert self._process.stdout
        os.set_blocking(self._process.stdout.fileno(), False)
        self._buffer = b""
        self._events: list[Event] = []
        self.process = Process(self._process.pid, "driver")
        self.wait("up")

    def do(self, action: str, **words: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"do": action, **words}).encode() + b"\n")
        self._process.stdin.flush()

    def ask(self, action: str, answer: str, **words: Any) -> Event:
        self.do(action, **words)
        return self.wait(answer)

    def wait(self, name: str, timeout: float = HANG) -> Event:
        """The next event of that name; others are kept."""
        deadline = time.monotonic() + timeout
        while True:
            for index, event in enumerate(self._events):
                if event["event"] == name:
                    return self._events.pop(index)
            self._read(deadline, name)

    def seen(self, name: str) -> Event | None:
        """An event of that name that has come already."""
        with contextlib.suppress(Hang):
            return self.wait(name, 0)
        return None

    def forget(self) -> None:
        """Drops what has come so far."""
        while self.seen("none") is not None:
            pass
        self._events.clear()

    def _read(self, deadline: float, name: str) -> None:
        out = self._process.stdout
        assert out
        if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise Hang(f"the driver did not tell `{name}`")
        chunk = out.read(65536)
        if not chunk:
            raise Hang(f"the driver ended before it told `{name}`")
        self._buffer += chunk
        *lines, self._buffer = self._buffer.split(b"\n")
        self._events += [json.loads(line) for line in lines]

    def close(self) -> None:
        self.process.signal(signal.SIGCONT)
        self.process.signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._log.close()
        self.process.close()


class Ground:
    """Two hosts, a daemon on each, and what can be done to them. Host a has the head."""

    def __init__(
        self,
        *,
        seed: int = 1,
        cpus: int = 2,
        daemon_environment: Callable[[Path], Mapping[str, str]] | None = None,
        small_disk: bool = True,
    ) -> None:
        self._exit = contextlib.ExitStack()
        self._busy = False
        try:
            self.a, self.b, self.wire = self._exit.enter_context(wired_hosts(seed=seed))
            hosts = [self.a, self.b]
            cluster = Cluster(hosts, cpus=cpus, daemon_environment=daemon_environment)
            self.cluster = self._exit.enter_context(cluster)
            if small_disk:
                self._small_disk()
            self.cluster.head(0)
            self.cluster.join(1)
            self.cluster.wait_alive(2)
        except BaseException:
            self._exit.close()
            raise

    def daemon(self, host: str) -> Process:
        """The daemon of a host as it runs now; close the handle after use."""
        return Process(self.cluster.daemon_pid("ab".index(host)), f"daemon@{host}")

    def restart_daemon(self, host: str) -> None:
        """Starts the daemon again that was killed: the head returns when it is ready, a node joins in the background."""
        if host == "a":
            self.cluster.head(0)
        else:
            self.cluster.join(1)

    def make_busy(self) -> None:
        """Saturates every core of the machine, for as long as anybody asks for it."""
        if not self._busy:
            self._busy = True
            self.wire.ahead()
            saturation.begin()

    def make_quiet(self) -> None:
        """No longer asks for it."""
        if self._busy:
            self._busy = False
            saturation.end()

    def _small_disk(self) -> None:
        """Gives host b's run dir a file system of its own, so that it can be filled."""
        run_dir = self.cluster.run_dir(1)
        run_dir.mkdir(mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "rayless-test", run_dir], check=True)
        self._exit.callback(subprocess.run, ["umount", "--lazy", str(run_dir)], check=False)

    def fill_disk(self) -> None:
        """Leaves no byte free in host b's run dir."""
        with (self.cluster.run_dir(1) / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass

    def empty_disk(self) -> None:
        (self.cluster.run_dir(1) / "filler").unlink(missing_ok=True)

    def states(self) -> dict[str, str]:
        """Node name to state, as the head says; while there is none, why."""
        try:
            return {node["name"]: node["state"] for node in self.cluster.status(0)["nodes"]}
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            return {"no status": str(error)}

    def events(self) -> list[str]:
        """The kinds of what happened in the cluster, oldest first."""
        return [event["kind"] for event in self.cluster.status(0)["events"]]

    def wait_alive(self, since: float) -> float:
        """Seconds from `since` until both nodes are alive."""
        self.until(lambda: list(self.states().values()) == ["alive", "alive"], "both nodes are alive")
        return time.monotonic() - since

    def until(self, condition: Callable[[], bool], what: str, timeout: float = HANG) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise Hang(f"it did not come to pass that {what}: {self.states()}")
            time.sleep(0.003)

    def keep_logs(self, folder: Path) -> None:
        """Copies what daemons, driver and workers wrote."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in self.cluster.base.rglob("*.log"):
            shutil.copy(path, folder / "-".join(path.relative_to(self.cluster.base).parts))

    def close_ground(self) -> None:
        """Ends the daemons and takes the hosts away."""
        self.make_quiet()
        # While its run dir can still be found by name.
        self.b.run([self.cluster.rayless, "stop", "--run-dir", str(self.cluster.run_dir(1))], check=False)
        self._exit.close()


class Stage(Ground):
    """Host a has the head and the driver, host b the other node. A group has two ranks on each."""

    RANKS = 4

    def __init__(self, *, seed: int = 1, cpus: int = 2) -> None:
        super().__init__(seed=seed, cpus=cpus)
        try:
            self.folder = self.cluster.base / "marks"
            self.folder.mkdir()
            self.driver = self._new_driver()
        except BaseException:
            self.close_ground()
            raise
        self.group: Event = {}
        self.processes: list[Process] = []
        self.ports = self.listening()

    # --- the group ---

    def start(self) -> None:
        """Starts a group and waits until it takes calls."""
        self._forget()
        self.group = self.driver.ask("start", "started", folder=str(self.folder), n=self.RANKS)
        if not self.group["ok"]:
            raise Hang(f"no group: {self.group['line']}")
        self._remember()

    def start_loading(self) -> None:
        """Starts a group and waits until all its ranks are inside their constructor."""
        self._forget()
        self.driver.do("start", folder=str(self.folder), n=self.RANKS, load=True)
        self._arrived("load")
        self._remember()

    def go(self) -> float:
        """Lets ranks on that wait for it."""
        (self.folder / "go").touch()
        return time.monotonic()

    def hold(self, method: str = "hold", args: tuple[Any, ...] = ()) -> None:
        """Makes a call and waits until all ranks are inside it."""
        self.driver.do("call", method=method, args=args)
        self._arrived("hold")

    def _arrived(self, where: str) -> None:
        marks = [self.folder / f"{where}.{rank}" for rank in range(self.RANKS)]
        self.until(lambda: all(mark.exists() for mark in marks), f"all ranks arrive at {where}")

    def _forget(self) -> None:
        for mark in self.folder.iterdir():
            mark.unlink()
        for process in self.processes:
            process.close()
        self.processes = []
        self.driver.forget()

    def _remember(self) -> None:
        """Opens a handle of every process of the group, before anything ends."""
        daemons = {self.cluster.daemon_pid(0), self.cluster.daemon_pid(1), self.driver.process.pid}
        for host in (self.a, self.b):
            for pid in host.pids():
                if pid not in daemons:
                    self.processes.append(Process(pid, f"{_what(pid)}@{'ab'[host is self.b]}"))

    def worker(self, host: str) -> Process:
        """A worker on host "a" or "b"."""
        return next(p for p in self.processes if p.what == f"worker@{host}")

    def worker_rank(self, host: str) -> int:
        """The lowest rank on a host."""
        return min(rank["rank"] for rank in self.group["ranks"] if rank["node"] == f"host{'ab'.index(host)}")

    def keeper(self, host: str) -> Process:
        return next(p for p in self.processes if p.what == f"keeper@{host}")

    def new_driver(self) -> None:
        self.driver.close()
        self.driver = self._new_driver()

    def _new_driver(self) -> Driver:
        return Driver(self.a, self.cluster.environment(0), self.cluster.base / "driver.log")

    # --- what is observed ---

    def group_gone(self, since: float, but: tuple[str, ...] = ()) -> tuple[float | None, list[str]]:
        """Seconds from `since` until the last process of the group has ended, and what still runs at the end of patience."""
        deadline = time.monotonic() + HANG / 2
        awaited = [p for p in self.processes if p.what not in but]
        left = [p.what for p in awaited if not p.gone(deadline - time.monotonic())]
        return (None if left else time.monotonic() - since), left

    def listening(self) -> list[str]:
        """Every listening TCP and bound UDP socket of both hosts."""
        found = []
        for index, name in enumerate("ab"):
            pid = self.cluster.daemon_pid(index)
            for kind in ("tcp", "tcp6", "udp", "udp6"):
                for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
                    words = line.split()
                    local, state = words[1], words[3]
                    # A node's own UDP sockets have ports of the kernel's choice, a new one each time.
                    if state == "0A" or (state == "07" and int(local.split(":")[1], 16) == 6379):
                        found.append(f"{name} {kind} {int(local.split(':')[1], 16)}")
        return sorted(found)

    def leftovers(self) -> list[str]:
        """What of an ended group is still there: processes, memfds, sockets, ports."""
        left = []
        daemons = [self.cluster.daemon_pid(0), self.cluster.daemon_pid(1)]
        for host in (self.a, self.b):
            left += [_what(pid) for pid in host.pids() if pid not in (*daemons, self.driver.process.pid)]
        for pid in daemons:
            fds = [_readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
            left += [f"memfd of daemon {pid}" for name in fds if "memfd:" in name]
        for index in (0, 1):
            left += [f"{path.name} of host {index}" for path in (self.cluster.run_dir(index) / "keepers").glob("*")]
        if self.driver.process.gone(0):
            return left
        self.driver.ask("stop", "stopped")
        if (held := self.driver.ask("held", "held"))["memfds"]:
            left.append(f"{held['memfds']} memfds of the driver")
        left += [f"port {port}" for port in self.listening() if port not in self.ports]
        return left

    def group_state(self) -> str:
        """State of the group as the head says, with the number of its ranks."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            for group in self.cluster.status(0)["groups"]:
                if group["id"] == self.group["group"]:
                    return f"{group['state']} {len(group['workers'])}"
        return "unknown"

    def close(self) -> None:
        for process in self.processes:
            process.signal(signal.SIGCONT)
            process.close()
        self.processes = []
        self.driver.close()
        self.close_ground()

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _what(pid: int) -> str:
    """What a process of a group is, from its command line."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"rayless._worker" in words:
            return "worker"
        if b"keeper" in words[1:2]:
            return "keeper"
        return b" ".join(words[:4]).decode(errors="replace").strip()
    return "ended"


def _readlink(path: Path) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


__all__ = ["HANG", "Driver", "Event", "Hang", "Process", "Stage", "Wire"]
