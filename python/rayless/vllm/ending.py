"""The end of an engine: EngineCore gets the time to stop its workers in order, and does not outlive its front end.

``--shutdown-timeout 0``, the default, says how long requests may go on when ``vllm serve`` is told to end: not at all. vLLM 0.25 and
newer take it for the time of EngineCore's process as well and kill it in the moment in which they ask it to end (only on ROCm do they
tell the two apart). Its group then has lost its driver, which is what a crash looks like. So the front end waits until EngineCore's
group is stopped, for some seconds at most, before it goes on as vLLM does.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

#: At most; up to 0.20 vLLM itself gave as much.
SECONDS = 5.0
#: Between two looks at the groups, and for the first one.
_LOOK_SECONDS = 0.05
_FIRST_LOOK_SECONDS = 0.5
_PATCHED = "__rayless__"


def let_engines_end() -> None:
    """Has this process, if it is a front end, wait for EngineCore's group. May be called again."""
    from vllm.v1.engine.utils import CoreEngineProcManager

    original = getattr(CoreEngineProcManager, "shutdown", None)  # not there up to 0.15, where vLLM waits
    if original is None or getattr(original, _PATCHED, False):
        return

    @functools.wraps(original)
    def shutdown(self: Any, timeout: float | None = None) -> None:
        # With a time for requests, a budget of nothing is what they have left of it.
        if timeout == 0 and not getattr(self, "_request_shutdown_timeout", 0):
            _end(self.processes)
        original(self, timeout=timeout)

    setattr(shutdown, _PATCHED, True)
    CoreEngineProcManager.shutdown = shutdown


def end_with_front_end() -> None:
    """Has this process, if it is EngineCore in a process of its own, end with the front end that started it.

    A front end that is killed cannot ask EngineCore to end, and vLLM leaves it running, with its workers and their GPUs, waiting for requests.
    Its workers then go the way of all groups that lose their driver.
    """
    import multiprocessing

    front_end = multiprocessing.parent_process()
    if front_end is None or not multiprocessing.current_process().name.startswith("EngineCore"):
        return
    threading.Thread(target=_outlive_nobody, args=(front_end.sentinel,), name="rayless-front-end", daemon=True).start()


def _outlive_nobody(sentinel: int) -> None:
    from multiprocessing.connection import wait

    wait([sentinel])
    print("rayless: vLLM's front end is gone, its EngineCore ends", file=sys.stderr, flush=True)
    os._exit(1)


def _end(processes: Sequence[BaseProcess]) -> None:
    """SIGTERM to EngineCore, then until its group is stopped or it has ended."""
    from multiprocessing.connection import wait

    looked, stopped = threading.Event(), threading.Event()
    drivers = {process.pid for process in processes}
    # In a thread of its own: a daemon that hangs must not keep anybody from ending.
    threading.Thread(target=_watch, args=(drivers, looked, stopped), name="rayless-ending", daemon=True).start()
    looked.wait(_FIRST_LOOK_SECONDS)
    for process in processes:
        if process.is_alive():
            process.terminate()
    limit = time.monotonic() + SECONDS
    while not stopped.is_set() and time.monotonic() < limit:
        alive = [process.sentinel for process in processes if process.is_alive()]
        if not alive:
            return
        wait(alive, _LOOK_SECONDS)


def _watch(drivers: set[int | None], looked: threading.Event, stopped: threading.Event) -> None:
    """Tells when what these processes drive now is stopped."""
    running = _live_groups(drivers)
    looked.set()
    limit = time.monotonic() + SECONDS
    # Not knowing (no head) is no reason to stop waiting.
    while running and time.monotonic() < limit:
        if _live_groups(drivers) == 0:
            stopped.set()
            return
        time.sleep(_LOOK_SECONDS)


def _live_groups(drivers: set[int | None]) -> int | None:
    """How many groups these processes of this host drive; ``None`` where nobody can tell."""
    import rayless
    from rayless.exceptions import RayError

    try:
        report = rayless.status()
    except RayError:
        return None
    live = [group for group in report["groups"] if group["state"] in ("starting", "running")]
    return sum(group["driver"]["pid"] in drivers for group in live)
