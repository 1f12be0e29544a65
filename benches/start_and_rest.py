"""How fast a node starts, and what it costs at rest.

    python benches/start_and_rest.py [--starts 25] [--seconds 60] [--json FILE]

Two network namespaces are the two hosts. Start: wall time of ``rayless head --daemon`` (returns once it is ready) and of
``rayless join --daemon`` (returns once the head has accepted it), the floor beside them being ``rayless --version``. Rest: two nodes
alone; processes, threads, proportional memory (PSS), CPU over the given time, bytes on the wire between them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from netns import Host, hosts
from nodes import new_token
from serving import rayless_command


def timed(host: Host, command: list[str]) -> float:
    """Milliseconds of wall time that a command takes on a host."""
    begin = time.perf_counter_ns()
    host.run(command)
    return (time.perf_counter_ns() - begin) / 1e6


def spread(values: list[float]) -> dict[str, float]:
    """Median, maximum and count."""
    return {"median": round(statistics.median(values), 2), "max": round(max(values), 2), "n": len(values)}


def process_facts(pid: int) -> dict[str, float]:
    """Threads, PSS in MB and CPU seconds of a process."""
    base = Path(f"/proc/{pid}")
    pss = sum(
        int(line.split()[1]) for line in (base / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:")
    )
    # utime and stime are the 14th and 15th field; what precedes them is a name in brackets.
    fields = (base / "stat").read_text().rpartition(")")[2].split()
    # schedstat counts nanoseconds; the tick of `stat` is too coarse for a process that sleeps.
    nanoseconds = sum(int((task / "schedstat").read_text().split()[0]) for task in (base / "task").iterdir())
    return {"threads": int(fields[17]), "pss_mb": pss / 1000, "cpu_s": nanoseconds / 1e9}


def wire_bytes(host: Host) -> int:
    """Bytes that the host has sent on its link."""
    shown = host.run(["cat", f"/sys/class/net/{host.interface}/statistics/tx_bytes"])
    return int(shown.stdout)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rayless = rayless_command()

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rayless-bench-") as base, hosts(2) as (a, b):
        token = new_token(Path(base))

        def daemon(host: Host, words: list[str], run_dir: str) -> list[str]:
            shared = ["--token-file", str(token), "--run-dir", run_dir, "--bind", host.address, "--daemon"]
            return [rayless, *words, *shared]

        def stop(host: Host, run_dir: str) -> None:
            host.run([rayless, "stop", "--run-dir", run_dir], check=False)

        floor, head, join = [], [], []
        for turn in range(options.starts):
            dirs = [f"{base}/a{turn}", f"{base}/b{turn}"]
            try:
                floor.append(timed(a, [rayless, "--version"]))
                head.append(timed(a, daemon(a, ["head"], dirs[0])))
                join.append(timed(b, daemon(b, ["join", f"{a.address}:6379"], dirs[1])))
            finally:
                stop(b, dirs[1])
                stop(a, dirs[0])
        # `ip netns exec` and the fork of this program are in every figure, so also in the floor.
        result["start_ms"] = {"--version": spread(floor), "head": spread(head), "join": spread(join)}

        dirs = [f"{base}/a", f"{base}/b"]
        a.run(daemon(a, ["head"], dirs[0]))
        b.run(daemon(b, ["join", f"{a.address}:6379"], dirs[1]))
        try:
            time.sleep(5)  # Slow probes after the start are not rest.
            rows = {}
            before = {host: ({pid: process_facts(pid) for pid in host.pids()}, wire_bytes(host)) for host in (a, b)}
            begin = time.monotonic()
            time.sleep(options.seconds)
            elapsed = time.monotonic() - begin
            for name, host in (("head", a), ("node", b)):
                facts = {pid: process_facts(pid) for pid in host.pids()}
                old, old_bytes = before[host]
                cpu = sum(f["cpu_s"] - old[pid]["cpu_s"] for pid, f in facts.items() if pid in old)
                rows[name] = {
                    "processes": len(facts),
                    "threads": sum(f["threads"] for f in facts.values()),
                    "pss_mb": round(sum(f["pss_mb"] for f in facts.values()), 2),
                    "cpu_percent_of_a_core": round(100 * cpu / elapsed, 4),
                    "sent_bytes_per_s": round((wire_bytes(host) - old_bytes) / elapsed, 1),
                }
            result["rest"] = {"seconds": options.seconds, **rows}
        finally:
            stop(b, dirs[1])
            stop(a, dirs[0])
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
