"""A real vLLM engine in two pipeline stages, one on each of two hosts on a damaged wire, with somebody who asks it and somebody who looks at its
health: where the engine cells of the failure matrix play. With vLLM's build for CPUs, or on one GPU, which every host takes for its own."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stage import HANG, HERE, Ground, Hang, Process

sys.path[:0] = [str(HERE.parent), str(HERE.parent / "setup"), str(HERE.parent / "vllm")]

import leftovers

import tiny_models
from serving import CPU_FLAGS, Server

#: Where an engine is found: its ranks are up and about to take their devices and to meet each other; they are about to load weights; it answers a
#: long request; nobody asks it.
MOMENTS = ("start", "loading", "request", "idle")
BEFORE_READY = MOMENTS[:2]
FLAGS = ("--pipeline-parallel-size", "2", "--distributed-executor-backend", "rayless")


@dataclass(frozen=True)
class Build:
    """What an engine is told beyond `FLAGS`, by the kind of its vLLM."""

    flags: tuple[str, ...]
    gpu: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


CPU = Build((*CPU_FLAGS, "--dtype", "float32", "--worker-cls", "loading.CpuWorker"))
#: Both stages, and those of other lanes, are on one GPU: a fixed share for each, no memory profiled (it changes by what others do), and nothing over
#: NCCL, which takes one rank of a GPU only. The newer runner, with async scheduling.
GPU = Build(
    (
        *("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8", "--dtype", "bfloat16"),
        *("--gpu-memory-utilization", "0.02", "--kv-cache-memory-bytes", str(64 << 20)),
        *("--worker-cls", "loading.GpuWorker"),
    ),
    gpu=True,
    environment={
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_DISABLE_PYNCCL": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    },
)


def build() -> Build:
    """By the vLLM that is installed."""
    return CPU if importlib.metadata.version("vllm").endswith("cpu") else GPU


def gpu_memory() -> dict[int, int]:
    """Bytes of GPU memory by process id, as NVML tells."""
    from vllm.third_party import pynvml

    pynvml.nvmlInit()
    try:
        found: dict[int, int] = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(index)):
                found[process.pid] = found.get(process.pid, 0) + (process.usedGpuMemory or 0)
        return found
    finally:
        pynvml.nvmlShutdown()


def own_shared_memory() -> None:
    """Gives this process and its children a /dev/shm of their own: what is left there is then ours, whatever else runs on the machine."""
    clone_newns = 0x00020000  # `os.unshare` came with Python 3.12
    if ctypes.CDLL(None, use_errno=True).unshare(clone_newns) != 0:
        raise OSError(ctypes.get_errno(), "cannot have a mount namespace of our own")
    # What others mount (network namespaces) still comes in, what we mount does not go out.
    subprocess.run(["mount", "--make-rslave", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "rayless-test", "/dev/shm"], check=True)


#: A start of vLLM on a machine with other work.
START = 300.0
#: Where `loading.LoadingWorker` looks for its marks.
VARIABLE = "LOADING_MARKS"
CLOCK_LIBRARY = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


def clock_environment(base: Path) -> Mapping[str, str]:
    """Lets a test set the wall clock of the daemons (and of the keepers that they start) by a file; the monotonic clock stays. The kernel has no
    time namespace for the wall clock. Nothing where Debian's `faketime` is not installed."""
    if not CLOCK_LIBRARY.exists():
        return {}
    file = base / "clock"
    file.write_text("+0\n")
    return {
        "LD_PRELOAD": str(CLOCK_LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


class Asker:
    """Asks the engine in a thread: one long streamed answer after the other, or many short ones."""

    def __init__(self, server: Server, *, long: bool) -> None:
        self._server = server
        self._long = long
        self._over = threading.Event()
        self.under_way = threading.Event()
        self.answered = 0
        self.slowest = 0.0
        #: When a request failed, and the client's words.
        self.failed: tuple[float, str] | None = None
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        from openai import OpenAIError

        with self._server.client() as client:
            while not self._over.is_set():
                begin = time.monotonic()
                try:
                    for _ in client.completions.create(
                        model=self._server.name,
                        prompt="What is a pipeline?",
                        max_tokens=480 if self._long else 4,
                        extra_body={"ignore_eos": True},
                        stream=True,
                    ):
                        self.under_way.set()
                        if self._over.is_set() and self._long:
                            return
                except Exception as error:  # httpx's own errors come through while a stream is read
                    kind = "" if isinstance(error, OpenAIError) else f"{type(error).__name__}: "
                    self.failed = (time.monotonic(), kind + str(error))
                    return
                self.answered += 1
                self.slowest = max(self.slowest, time.monotonic() - begin)

    def stop(self, timeout: float) -> bool:
        """Ends after the answer that is under way; whether it did."""
        self._over.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def wait_failed(self, timeout: float) -> tuple[float, str] | None:
        """When the request failed, and how."""
        self._thread.join(timeout)
        return self.failed


class Health:
    """Looks at /health twenty times a second; notes when it first was not 200."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._over = threading.Event()
        self.bad: tuple[float, str] | None = None
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            begin = time.monotonic()
            try:
                said = str(self._server.get("/health", timeout=2))
            except OSError as error:
                said = "no answer" if isinstance(error, TimeoutError) else "connection refused"
            if said != "200" and self.bad is None:
                self.bad = (begin, said)

    def wait_bad(self, timeout: float) -> tuple[float, str] | None:
        deadline = time.monotonic() + timeout
        while self.bad is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.bad

    def stop(self) -> None:
        self._over.set()
        self._thread.join(5)


class EngineStage(Ground):
    """Host a has the head and `vllm serve`; stage 0 of the model is on a, stage 1 on b."""

    def __init__(self, *, damage: bool = True, start: float = START, seed: int = 1) -> None:
        """Without `damage` the daemons' clocks and host b's disk are the machine's own: for a run whose daemons are measured. `start`: seconds that an
        engine may take to load, and again to be ready."""
        self._patience = start
        self._before = leftovers.shared_memory()
        environment = clock_environment if damage else None
        super().__init__(seed=seed, daemon_environment=environment, small_disk=damage)
        self.build = build()
        self.model = tiny_models.ensure("llama")
        self.marks = self.cluster.base / "marks"
        self.marks.mkdir()
        self.server: Server | None = None
        self.processes: list[Process] = []
        self.ready_in: list[float] = []
        self._starts = 0
        self._shared_memory = leftovers.shared_memory()

    # --- the engine ---

    def engine(self) -> Server:
        """The engine that runs, else a new one; ready."""
        if self.server is None:
            self.load()
            self.let_load()
        assert self.server
        return self.server

    def begin(self) -> None:
        """Starts an engine and waits until both ranks are up, before they take their devices and meet each other."""
        self.end_engine()
        for mark in self.marks.iterdir():
            mark.unlink()
        self._starts += 1
        paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
        extra = {**self.build.environment, VARIABLE: str(self.marks), "PYTHONPATH": paths}
        log = self.cluster.base / f"engine-{self._starts}.log"
        self.begun = time.monotonic()
        flags = (*FLAGS, *self.build.flags)
        self.server = Server(self.a, self.cluster.environment(0, extra), self.model, *flags, log=log)
        self._arrived("start")
        self._remember()

    def load(self) -> None:
        """Starts an engine and waits until both ranks are about to load their weights."""
        self.begin()
        self._let_on("start")
        self._arrived("load")
        self._remember_more()

    def let_load(self) -> float:
        """Lets the ranks go on from wherever they stopped; seconds until the engine is ready."""
        assert self.server
        self._let_on("start")
        self._let_on("load")
        self.server.wait_ready(self._patience)
        self._remember_more()
        self.ready_in.append(time.monotonic() - self.begun)
        if self.build.gpu and not {self.worker(host).pid for host in "ab"} <= gpu_memory().keys():
            raise Hang("NVML does not tell what memory the ranks hold, so nothing can be said of what is left of it")
        return self.ready_in[-1]

    def _let_on(self, where: str) -> None:
        (self.marks / f"{where}.go").touch()

    def _arrived(self, where: str) -> None:
        server = self.server
        assert server

        def there() -> bool:
            if server.process.poll() is not None:
                raise Hang(f"vllm serve ended with {server.process.returncode}:\n{server.tail()}")
            return all((self.marks / f"{where}.{rank}").exists() for rank in (0, 1))

        self.until(there, f"both ranks stop at {where}", self._patience)

    def _remember(self) -> None:
        """Opens a handle of every process of the engine, before anything ends."""
        assert self.server
        (self.group,) = self.running()
        names = {node["id"]: node["name"] for node in self.cluster.status()["nodes"]}
        known = {self.server.process.pid: "api server", self.group["driver"]["pid"]: "EngineCore"}
        for worker in self.group["workers"]:
            known[worker["pid"]] = f"worker@{'ab'[names[worker['node']] == 'host1']}"
        for index, name in enumerate("ab"):
            for file in (self.cluster.run_dir(index) / "keepers").glob("*.pid"):
                known[int(file.read_text())] = f"keeper@{name}"
        self._remember_more(known)

    def _remember_more(self, known: Mapping[int, str] | None = None) -> None:
        """The same for what has no handle yet: helpers that an engine starts on its way up."""
        others = {self.cluster.daemon_pid(0), self.cluster.daemon_pid(1), *(process.pid for process in self.processes)}
        for host in (self.a, self.b):
            for pid in host.pids():
                if pid not in others:
                    with contextlib.suppress(ProcessLookupError):
                        self.processes.append(Process(pid, (known or {}).get(pid, "helper")))

    def process(self, what: str) -> Process:
        """One of "api server", "EngineCore", "worker@a", "keeper@b", …"""
        return next(process for process in self.processes if process.what == what)

    def worker(self, host: str) -> Process:
        return self.process(f"worker@{host}")

    def keeper(self, host: str) -> Process:
        return self.process(f"keeper@{host}")

    def end_engine(self) -> None:
        """Whatever state it is in."""
        for process in self.processes:
            process.signal(18)  # SIGCONT
        if self.server is not None:
            self.server.__exit__(None, None, None)
            self.server = None
        for process in self.processes:
            process.close()
        self.processes = []

    def running(self) -> list[dict[str, Any]]:
        groups = self.cluster.status()["groups"]
        return [group for group in groups if group["state"] in ("starting", "running")]

    def group_now(self) -> dict[str, Any]:
        """The engine's group as the head knows it now; its state is "unknown" where it does not."""
        with contextlib.suppress(RuntimeError):
            for group in self.cluster.status()["groups"]:
                if group["id"] == self.group["id"]:
                    found: dict[str, Any] = group
                    return found
        return {"state": "unknown", "cause": ""}

    # --- the machines ---

    def set_clock(self, hours: int) -> None:
        """Sets the wall clock of both daemons so many hours away from the true one, and sees that the head's log has the new time: a stranger,
        who is turned away, makes it write."""
        (self.cluster.base / "clock").write_text(f"{hours:+}h\n")
        stranger = self.cluster.base / "stranger"
        with stranger.open("w") as token:
            stranger.chmod(0o600)
            subprocess.run([self.cluster.rayless, "token", "new"], stdout=token, check=True)
        command = self.cluster.join_command(1)
        command[command.index("--token-file") + 1] = str(stranger)
        command[command.index("--run-dir") + 1] = str(self.cluster.base / "stranger-run")
        log = self.cluster.run_dir(0) / "daemon.log"
        known = len(log.read_text().splitlines())

        def told() -> bool:  # of several strangers in a second, one is logged
            refused = self.b.run([*command, "--port", "0"], env=self.cluster.environment(1), check=False)
            if refused.returncode != 4:
                raise Hang(f"a stranger got {refused.returncode}: {refused.stderr}")
            lines = [line for line in log.read_text().splitlines()[known:] if "turned away" in line]
            times = [datetime.fromisoformat(line.split()[0].replace("Z", "+00:00")) for line in lines]
            now = datetime.now(timezone.utc)
            return any(abs((time - now).total_seconds() / 3600 - hours) < 0.1 for time in times)

        self.until(told, f"the head's clock is {hours} h away", 10)

    # --- what is observed ---

    def gone(self, since: float, but: tuple[str, ...] = (), *, group: bool = False) -> tuple[float | None, list[str]]:
        """Seconds from `since` until the last process of the engine (or of its `group`: keepers and workers) has ended, and what still runs at the end
        of patience."""
        deadline = time.monotonic() + HANG
        awaited = [process for process in self.processes if process.what not in but]
        if group:
            awaited = [process for process in awaited if process.what.startswith(("keeper", "worker"))]
        left = [process.what for process in awaited if not process.gone(deadline - time.monotonic())]
        return (None if left else time.monotonic() - since), left

    def leftovers(self) -> list[str]:
        """What of an ended engine is still there: processes, names in /dev/shm, sockets, things that are held."""
        daemons = {self.cluster.daemon_pid(0), self.cluster.daemon_pid(1)}
        left = [f"process {pid}" for host in (self.a, self.b) for pid in host.pids() if pid not in daemons]
        left += sorted(leftovers.unused_shared_memory(self._shared_memory) - self._of_clocks())
        for index in (0, 1):
            left += [f"{path.name} of host {index}" for path in (self.cluster.run_dir(index) / "keepers").glob("*")]
        for node in self.cluster.status()["nodes"]:
            if node["available"] != node["resources"]:
                left.append(f"resources of {node['name']}")
            left += [
                f"GPU {gpu['index']} of {node['name']} is {gpu['state']}"
                for gpu in node["gpus"]
                if gpu["state"] != "free"
            ]
        if self.build.gpu:
            held = gpu_memory()
            left += [f"{held[p.pid] >> 20} MiB of GPU memory of {p.what}" for p in self.processes if p.pid in held]
        return left

    def _of_clocks(self) -> set[str]:
        """Names in /dev/shm that libfaketime made in daemons and keepers that are no longer; a killed one cannot remove its own."""
        unused = leftovers.unused_shared_memory(self._before)
        return {name for name in unused if name.startswith(("faketime_shm_", "sem.faketime_sem_"))}

    def engine_line(self) -> str:
        """What the executor said in the server's log when its group failed."""
        assert self.server
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.server.log.read_text(errors="replace"))
        # The place that logged it, not a frame of a traceback, which has the path of this checkout.
        lines = [line for line in text.splitlines() if "ERROR" in line and "[executor.py:" in line]
        return lines[0].split("] ", 1)[-1].strip() if lines else ""

    def close(self) -> None:
        self.end_engine()
        self.close_ground()
        leftovers.remove(self._of_clocks())
