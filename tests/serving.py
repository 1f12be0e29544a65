"""A rayless cluster on test hosts, and ``vllm serve`` on it; for the tests, the demo and the benches.

with hosts(2) as pair, Cluster(pair) as cluster:
    cluster.join(1); cluster.head(0)
    with Server(cluster, 0, model, "-pp", "2") as server:
        server.wait_ready()
        print(server.completion("Hello"))
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from netns import Host

PORT = 6379

#: What vLLM's CPU build needs for several workers on a small machine; nothing of it concerns rayless.
CPU_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
#: Dynamo without inductor: with --enforce-eager, pipeline stages fail on CPU (a fault of vLLM's), and inductor compiles
#: for half a minute.
CPU_FLAGS = ("-cc.mode=2", "-cc.backend=eager", "--max-model-len", "512", "--max-num-seqs", "8")


def rayless_command() -> str:
    """The command under test."""
    found = shutil.which("rayless")
    if found is None:
        raise RuntimeError(
            "no `rayless` on PATH\nhint: run it through make, which builds target/site and puts it there"
        )
    return found


class Cluster:
    """One daemon per host, each with a run dir of its own; a token that nobody else has."""

    def __init__(
        self,
        hosts: list[Host],
        *,
        cpus: int = 2,
        dead_after: float | None = None,
        daemon_environment: Callable[[Path], Mapping[str, str]] | None = None,
    ) -> None:
        self.hosts = hosts
        self.rayless = rayless_command()
        self._dead_after = dead_after
        self._cpus = cpus
        # /var/tmp: a run dir is no place for a tmpfs that the machine's tests share, and its path is short.
        self.base = Path(tempfile.mkdtemp(prefix="rayless-test-", dir="/var/tmp"))
        #: On top of a daemon's environment, made from the folder of this cluster.
        self._daemon_extra = {} if daemon_environment is None else dict(daemon_environment(self.base))
        self.token_file = self.base / "token"
        made = subprocess.run([self.rayless, "token", "new"], capture_output=True, text=True, check=True)
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(made.stdout)

    def run_dir(self, index: int) -> Path:
        """Where the daemon of a host keeps its sockets and logs."""
        return self.base / f"host{index}"

    def environment(self, index: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a driver on a host."""
        ours = {"RAYLESS_RUN_DIR": str(self.run_dir(index)), "TMPDIR": str(self.base), **CPU_ENVIRONMENT}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAYLESS_", "VLLM_"))}
        return {**inherited, **ours, **(extra or {})}

    def head_command(self, index: int) -> list[str]:
        """``rayless head`` on a host."""
        dead_after = [] if self._dead_after is None else ["--dead-after", str(self._dead_after)]
        return [self.rayless, "head", *self._shared(index), *dead_after]

    def join_command(self, index: int, head: int = 0) -> list[str]:
        """``rayless join`` on a host."""
        return [self.rayless, "join", f"{self.hosts[head].address}:{PORT}", *self._shared(index)]

    def _shared(self, index: int) -> list[str]:
        return [
            *("--bind", self.hosts[index].address),
            *("--name", f"host{index}"),
            *("--cpus", str(self._cpus)),
            *("--token-file", str(self.token_file)),
            *("--run-dir", str(self.run_dir(index))),
        ]

    def head(self, index: int = 0) -> None:
        """Starts the head in the background; returns once it is ready."""
        env = self.environment(index, self._daemon_extra)
        self.hosts[index].run([*self.head_command(index), "--daemon"], env=env)

    def join(self, index: int = 1, head: int = 0) -> subprocess.Popen[bytes]:
        """Starts a node that joins whenever its head is there; returns at once."""
        log = (self.base / f"join{index}.log").open("wb")
        return self.hosts[index].popen(
            self.join_command(index, head),
            env=self.environment(index, self._daemon_extra),
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def status(self, index: int = 0) -> dict[str, Any]:
        """``rayless status --json`` as a host sees it."""
        shown = self.hosts[index].run(
            [self.rayless, "status", "--json", "--run-dir", str(self.run_dir(index))], env=self.environment(index)
        )
        report: dict[str, Any] = json.loads(shown.stdout)
        return report

    def wait_alive(self, count: int, timeout: float = 30) -> None:
        """Returns when ``count`` nodes are alive."""

        def enough() -> bool:
            with contextlib.suppress(RuntimeError):
                return sum(node["state"] == "alive" for node in self.status()["nodes"]) >= count
            return False

        until(enough, timeout, f"{count} nodes are alive")

    def daemon_pid(self, index: int) -> int:
        """The daemon of a host."""
        return int((self.run_dir(index) / "daemon.pid").read_text().split()[0])

    def close(self) -> None:
        """Ends every daemon and what it started, then removes the run dirs."""
        for index in reversed(range(len(self.hosts))):
            if self.run_dir(index).exists():
                stop = [self.rayless, "stop", "--run-dir", str(self.run_dir(index))]
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.hosts[index].run(stop, env=self.environment(index), check=False, timeout=20)
        shutil.rmtree(self.base, ignore_errors=True)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Server:
    """``vllm serve`` on one of the hosts."""

    def __init__(
        self,
        host: Host,
        environment: Mapping[str, str],
        model: Path | str,
        *flags: str,
        log: Path,
        name: str = "tiny",
        api_key: str | None = None,
    ) -> None:
        self.host = host
        self.name = name
        self.api_key = api_key
        self.log = log
        self.port = free_port(host)
        self.base = f"http://{host.address}:{self.port}"
        key = [] if api_key is None else ["--api-key", api_key]
        # As a module, so that it is this Python's vLLM whatever is on PATH.
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        address = ["--host", host.address, "--port", str(self.port), "--served-model-name", name]
        with log.open("wb") as out:
            self.process = host.popen([*command, *address, *key, *flags], env=environment, stdout=out)

    def wait_ready(self, timeout: float = 420, each_second: Callable[[float], None] | None = None) -> float:
        """Returns the seconds until it answers; raises with the end of its log where it ends first."""
        begin = time.monotonic()
        while (waited := time.monotonic() - begin) < timeout:
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm serve ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(OSError):
                if self.get("/health") == 200:
                    return waited
            if each_second is not None:
                each_second(waited)
            time.sleep(0.5)
        raise TimeoutError(f"vllm serve does not answer after {timeout:.0f} s:\n{self.tail()}")

    def get(self, path: str, timeout: float = 5) -> int:
        """The HTTP status of a GET."""
        with self.host.entered():
            try:
                with urllib.request.urlopen(self.base + path, timeout=timeout) as response:
                    return int(response.status)
            except urllib.error.HTTPError as error:
                return error.code

    @contextlib.contextmanager
    def client(self, api_key: str | None = None) -> Iterator[Any]:
        """An ``openai.OpenAI`` whose connections start on the server's host; for the thread that asks for it."""
        from openai import OpenAI

        key = api_key or self.api_key or "none"
        with self.host.entered(), OpenAI(base_url=f"{self.base}/v1", api_key=key, max_retries=0, timeout=120) as client:
            yield client

    def greedy_tokens(self, prompts: list[str], count: int) -> list[list[int]]:
        """The ids of the ``count`` likeliest next tokens of each prompt, asked one after the other."""
        found = []
        with self.client() as client:
            for prompt in prompts:
                made = client.completions.create(
                    model=self.name,
                    prompt=prompt,
                    temperature=0,
                    max_tokens=count,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )
                found.append(list(made.choices[0].token_ids))
        return found

    def stop(self, timeout: float = 60) -> int:
        """Ends it as a service manager would (SIGTERM) and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def tail(self, lines: int = 60) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def free_port(host: Host) -> int:
    """A TCP port that is free on the host now, below the range from which the kernel gives out ports."""
    with host.entered():
        for port in range(8000, 9000):
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind((host.address, port))
                return port
    raise RuntimeError(f"no free port from 8000 to 8999 on {host.address}")


def until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Returns as soon as the condition holds; raises ``TimeoutError`` naming it otherwise."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout:.0f} s it is still not so that {what}")
        time.sleep(0.05)
