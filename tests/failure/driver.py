"""The driver of the failure tests, a process of its own: does what lines of JSON on stdin say and tells on stdout what happens and
when (CLOCK_MONOTONIC, which all processes of a machine share)."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from typing import Any

import rayless
from hosted import Hosted

_lock = threading.Lock()


def say(event: str, **fields: Any) -> None:
    with _lock:
        print(json.dumps({"event": event, "time": time.monotonic(), **fields}), flush=True)


def outcome(error: BaseException | None) -> dict[str, Any]:
    if error is None:
        return {"ok": True}
    return {"ok": False, "type": type(error).__name__, "line": str(error).splitlines()[0]}


class Driver:
    group: rayless.WorkerGroup | None = None
    stepping = False

    def start(self, folder: str, n: int, load: bool = False) -> None:
        self.group = None
        try:
            self.group = rayless.WorkerGroup.start(Hosted, n, args=(folder, load), name="matrix", strategy="PACK")
        except BaseException as error:
            say("started", **outcome(error))
            return
        self.group.add_failure_callback(lambda error: say("failed", **outcome(error)))
        ranks = [{"rank": rank.rank, "node": rank.node_name, "pid": rank.pid} for rank in self.group.ranks]
        say("started", ok=True, group=self.group.id, ranks=ranks)

    def call(self, method: str, args: list[Any], timeout: float | None = None) -> None:
        assert self.group
        error: BaseException | None = None
        try:
            self.group.call(method, *args, timeout=timeout)
        except BaseException as raised:
            error = raised
        say("called", **outcome(error))

    def steps(self, period: float, size: int, tensor: int = 0) -> None:
        """Calls again and again until told otherwise, or until one fails; after every tenth call the ranks exchange tensors of `tensor`
        bytes, if any."""
        assert self.group
        self.stepping, count, slowest, error = True, 0, 0.0, None
        exchanged, slowest_exchange = 0, 0.0
        while self.stepping:
            begin = time.monotonic()
            try:
                self.group.call("step", bytes(size))
                slowest = max(slowest, time.monotonic() - begin)
                count += 1
                if tensor and count % 10 == 0:
                    begin = time.monotonic()
                    exchanged = min(self.group.call("exchange", tensor))
                    slowest_exchange = max(slowest_exchange, time.monotonic() - begin)
            except BaseException as raised:
                error = raised
                break
            time.sleep(period)
        say(
            "stepped",
            count=count,
            slowest=slowest,
            exchanged=exchanged,
            slowest_exchange=slowest_exchange,
            **outcome(error),
        )

    def enough(self) -> None:
        self.stepping = False

    def stop(self) -> None:
        if self.group:
            self.group.stop()
        self.group = None
        say("stopped")

    def held(self) -> None:
        """What this process still has of a group: memfds, mapped or open."""
        gc.collect()  # an exception and the frame that caught it hold each other, and the group with them
        with open("/proc/self/maps") as maps:
            mapped = sum("memfd:" in line for line in maps)
        names = [_target(fd) for fd in os.listdir("/proc/self/fd")]
        say(
            "held",
            memfds=mapped + sum("memfd:" in name for name in names),
            fds=len(names),
            threads=threading.active_count(),
        )

    def leave(self) -> None:
        """Ends as a program does that forgot to stop its group."""
        os._exit(0)


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def main() -> None:
    driver = Driver()
    say("up", pid=os.getpid())
    for line in sys.stdin:
        words = json.loads(line)
        action = getattr(driver, words.pop("do"))
        threading.Thread(target=action, kwargs=words, daemon=True).start()


if __name__ == "__main__":
    main()
