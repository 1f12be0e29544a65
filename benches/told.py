"""How soon a driver is told of a killed worker that holds gigabytes, beside the kernel's own word that it is gone.

    python benches/told.py [--gigabytes 3] [--kills 20] [--json FILE]

Two network namespaces are the two hosts, one rank on each, the driver in the first. A rank fills its memory and is killed; two clocks run
from there: until the driver has the cause, and until a pidfd of that process becomes readable (all of its memory is freed by then), which
is the soonest that anybody can know who waits for that.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

PATIENCE_S = 60


class Holder:
    """Hosted by rayless: has memory."""

    def fill(self, rank: int, size: int) -> None:
        """Has that rank write to every page of so many bytes."""
        if rank == int(os.environ["RAYLESS_RANK"]):
            self.memory = bytearray(b"\1") * size


def kill_once(rank: int, size: int) -> dict[str, float]:
    """Milliseconds from the kill until the driver was told, and until the process was gone."""
    import rayless

    group = rayless.WorkerGroup.start(Holder, 2, strategy="SPREAD")
    try:
        assert len({info.node_id for info in group.ranks}) == 2, "both ranks are on one node"
        # Every rank runs every call; the other has nothing to fill.
        group.call("fill", rank, size)
        pid = group.ranks[rank].pid
        told: list[float] = []
        heard = threading.Event()

        def on_failure(error: Exception) -> None:
            told.append(time.perf_counter())
            assert f"rank {rank}" in str(error) and "SIGKILL" in str(error), error
            heard.set()

        group.add_failure_callback(on_failure)
        gone: list[float] = []
        pidfd = os.pidfd_open(pid)

        def watch() -> None:
            select.select([pidfd], [], [], PATIENCE_S)
            gone.append(time.perf_counter())

        watcher = threading.Thread(target=watch)
        watcher.start()
        begin = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        watcher.join()
        os.close(pidfd)
        assert heard.wait(PATIENCE_S), "nobody told of it"
        return {"told_ms": 1000 * (told[0] - begin), "gone_ms": 1000 * (gone[0] - begin)}
    finally:
        group.stop()


def drive(size: int, kills: int) -> None:
    """Runs in the first namespace."""
    for rank, where in ((0, "the driver's node"), (1, "the other node")):
        seen = [kill_once(rank, size) for _ in range(kills)]
        print(json.dumps({"where": where, **{key: [one[key] for one in seen] for key in seen[0]}}), flush=True)


def main() -> None:
    """Sets the two hosts up, kills, and prints."""
    from nodes import two_nodes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        return drive(int(options.gigabytes * 1e9), options.kills)

    me = [sys.executable, os.path.abspath(__file__), "--drive"]
    me += ["--gigabytes", str(options.gigabytes), "--kills", str(options.kills)]
    with two_nodes() as nodes:
        env = dict(os.environ, RAYLESS_RUN_DIR=nodes.run_dir)
        done = nodes.a.run(me, env=env, timeout=PATIENCE_S * options.kills)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for result in results:
        report(result)
    if options.json:
        options.json.write_text(json.dumps({"gigabytes": options.gigabytes, "kills": results}, indent=1))


def report(result: dict[str, Any]) -> None:
    """Median and worst of both clocks, and the ratio of the medians."""
    told, gone = result["told_ms"], result["gone_ms"]
    ratio = statistics.median(told) / statistics.median(gone)
    print(f"a worker on {result['where']}, n={len(told)}:")
    for what, values in (("told", told), ("gone", gone)):
        print(f"  {what} after {statistics.median(values):6.1f} ms, at most {max(values):6.1f} ms")
    print(f"  told in {100 * ratio:.1f}% of the time that it takes the kernel")


if __name__ == "__main__":
    main()
