"""A real cluster of two nodes on loopback addresses, for every test here; a second one where a test breaks something."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rayless
from netns import hosts

RAYLESS = shutil.which("rayless")


def pytest_configure() -> None:
    """SIGTERM ends the whole run in order, not only the test that it meets."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))


class Node:
    """A daemon with its run dir."""

    def __init__(self, name: str, address: str, run_dir: Path) -> None:
        self.name = name
        self.address = address
        self.run_dir = run_dir

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``rayless WORDS`` against this node."""
        assert RAYLESS is not None
        with tempfile.TemporaryFile("w+") as out:  # a daemon must not hold the pipe of its starter
            done = subprocess.run(
                [RAYLESS, *words, "--run-dir", str(self.run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(),
                timeout=60,
            )
            out.seek(0)
            text = out.read()
        if check and done.returncode != 0:
            raise RuntimeError(f"rayless {' '.join(words)} ended with {done.returncode}:\n{text}\n{self.log()}")
        return subprocess.CompletedProcess(words, done.returncode, text, "")

    def log(self) -> str:
        """What the daemon wrote."""
        path = self.run_dir / "daemon.log"
        return path.read_text() if path.exists() else ""


class Cluster:
    """``nodes[0]`` is the head and the driver's node."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.run_dir = str(nodes[0].run_dir)

    def driver(self, code: str, *, run_dir: str | None = None, **env: str) -> subprocess.Popen[str]:
        """A driver of its own process, with its output in pipes."""
        # A shell starts what it puts in the background with SIGINT ignored, and that is inherited.
        hears_ctrl_c = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        return subprocess.Popen(
            [sys.executable, "-c", hears_ctrl_c + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(), "RAYLESS_RUN_DIR": run_dir or self.run_dir, **env},
            cwd=Path(__file__).parent,
        )


def environment() -> dict[str, str]:
    """This process's environment without what would lead to another cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAYLESS_")}


@contextlib.contextmanager
def a_cluster(names: tuple[str, ...] = ("a", "b"), gpus: int = 2) -> Iterator[Cluster]:
    """Nodes with 8 CPUs each, on addresses of 127.0.0.0/8 that no other run has."""
    if RAYLESS is None:
        pytest.exit("no `rayless` on PATH\nhint: run these tests through `make test-python`", returncode=2)
    with tempfile.TemporaryDirectory(prefix="rayless-py-") as base, hosts(len(names), loopback=True) as made:
        nodes = [Node(name, host.address, Path(base, name)) for name, host in zip(names, made, strict=True)]
        head = nodes[0]
        common = ["--daemon", "--cpus", "8", "--gpus", str(gpus)]
        try:
            head.command("head", "--bind", head.address, "--name", head.name, *common)
            token = head.run_dir / "token"
            for node in nodes[1:]:
                where = f"{head.address}:6379"
                node.command(
                    "join", where, "--bind", node.address, "--name", node.name, "--token-file", str(token), *common
                )
            yield Cluster(nodes)
        finally:
            for node in reversed(nodes):
                node.command("stop", check=False)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    with a_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The shared cluster, with this process as its driver; all its groups are stopped at the end."""
    monkeypatch.setenv("RAYLESS_RUN_DIR", shared_cluster.run_dir)
    monkeypatch.setenv("RAYLESS_WAIT", "30")
    try:
        yield shared_cluster
    finally:
        rayless.shutdown()


@pytest.fixture
def own_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that a test may break."""
    with a_cluster() as cluster:
        monkeypatch.setenv("RAYLESS_RUN_DIR", cluster.run_dir)
        monkeypatch.setenv("RAYLESS_WAIT", "30")
        try:
            yield cluster
        finally:
            rayless.shutdown()


@pytest.fixture
def start(cluster: Cluster) -> Callable[..., rayless.WorkerGroup]:
    """``WorkerGroup.start`` on the shared cluster."""
    return rayless.WorkerGroup.start


class Gate:
    """Holds ranks inside a method until the test lets them go: no sleeps. Who comes later passes."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._file = path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def open(self) -> None:
        """Lets all go. Idempotent."""
        self._file.close()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()  # a test that failed must not leave ranks behind in it


def gone(pids: list[int], within: float = 10) -> bool:
    """Whether all these processes have ended, told by the kernel."""
    deadline = time.monotonic() + within
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ready, _, _ = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return False
        finally:
            os.close(handle)
    return True


def groups_named(name: str) -> list[dict[str, Any]]:
    """The entries of ``rayless status`` for groups of that name."""
    return [group for group in rayless.status()["groups"] if group["name"] == name]
