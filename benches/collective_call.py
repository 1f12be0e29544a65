"""A collective call that does nothing: rayless beside vLLM's own MessageQueue, in turns, in one sitting.

    python benches/collective_call.py [--worlds 2,16] [--turns 3] [--calls 2000] [--json FILE]

Two network namespaces are the two hosts, half of the workers runs in each, the driver in the first. A call carries
2 KiB to every worker, and every worker answers with None. MessageQueue is set up as ``MultiprocExecutor`` does it with
``--nnodes 2``: one broadcast queue (shared memory on the driver's host, ZMQ over TCP to the other), one response queue
per worker. Two pacings are shown, because a spin flatters back-to-back figures: without a pause, and with 2 ms between
calls, as a model's step leaves it. Run it with a Python that has vLLM and this tree's rayless (``make site``).
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import sys
import time
from pathlib import Path
from typing import Any

PAYLOAD = os.urandom(2048)
GAP_S = 0.002


def measure(call: Any, calls: int) -> dict[str, dict[str, float]]:
    """p50 and p99 in microseconds of ``call()``, back to back and with a gap."""
    out: dict[str, dict[str, float]] = {}
    for pacing, gap, count in (("back to back", 0.0, calls), ("2 ms gap", GAP_S, max(calls // 4, 100))):
        for _ in range(50):
            call()
        times = []
        for _ in range(count):
            if gap:
                time.sleep(gap)
            begin = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - begin) / 1000)
        times.sort()
        out[pacing] = {"p50": times[count // 2], "p99": times[count * 99 // 100], "n": count}
    return out


class Worker:
    """Hosted by rayless: takes the bytes, gives nothing back."""

    def noop(self, payload: bytes) -> None:
        """Does nothing."""


def drive_rayless(world: int, calls: int) -> None:
    """Runs in the first namespace."""
    import rayless

    # A worker per slot; a node has as many slots as make half of the workers fill it.
    bundles = [{"slot": 16 / world}] * world
    group = rayless.WorkerGroup.start(Worker, world, bundles=bundles, strategy="PACK")
    try:
        nodes = {rank.node_id for rank in group.ranks}
        assert len(nodes) == 2, f"expected two nodes, got {nodes}"
        print(json.dumps(measure(lambda: group.call("noop", PAYLOAD), calls)), flush=True)
    finally:
        group.stop()


def drive_message_queue(world: int, calls: int, folder: Path, address: str) -> None:
    """Runs in the first namespace; the workers find the handle in ``folder``."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    local = world // 2
    queue = MessageQueue(world, local, local_reader_ranks=list(range(local)), connect_ip=address)
    publish(folder / "broadcast", queue.export_handle())
    responses = [MessageQueue.create_from_handle(await_handle(folder / f"response-{r}"), 0) for r in range(world)]
    queue.wait_until_ready()
    for response in responses:
        response.wait_until_ready()

    def call() -> None:
        queue.enqueue(("noop", (PAYLOAD,), {}, None))
        for response in responses:
            response.dequeue()

    print(json.dumps(measure(call, calls)), flush=True)
    queue.enqueue(None)


def message_queue_worker(rank: int, world: int, folder: Path, address: str) -> None:
    """One worker of the rival, on either host."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    queue = MessageQueue.create_from_handle(await_handle(folder / "broadcast"), rank)
    same_host = rank < world // 2
    response = MessageQueue(1, 1) if same_host else MessageQueue(1, 0, connect_ip=address)
    publish(folder / f"response-{rank}", response.export_handle())
    queue.wait_until_ready()
    response.wait_until_ready()
    while (message := queue.dequeue(indefinite=True)) is not None:
        assert message[0] == "noop"
        response.enqueue(None)


def message_queue_workers(ranks: list[int], world: int, folder: Path, address: str) -> None:
    """The workers of one host: vLLM is imported once, then forked."""
    import vllm.distributed.device_communicators.shm_broadcast  # noqa: F401

    children = []
    for rank in ranks:
        pid = os.fork()
        if pid == 0:
            try:
                message_queue_worker(rank, world, folder, address)
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


def publish(path: Path, handle: object) -> None:
    """Writes a handle so that readers see it whole."""
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(handle))
    part.rename(path)


def await_handle(path: Path) -> Any:
    """The handle, once it is there."""
    end = time.monotonic() + 120
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.01)
    return pickle.loads(path.read_bytes())


def environment(run_dir: str | None = None) -> dict[str, str]:
    """This process's environment, quiet, and pointed at one node's daemon."""
    env = dict(os.environ, VLLM_LOGGING_LEVEL="ERROR", RAYLESS_LOG_TO_DRIVER="0")
    if run_dir:
        env["RAYLESS_RUN_DIR"] = run_dir
    return env


def last_json(text: str) -> dict[str, Any]:
    """The last line that is JSON."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(text)
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    """Sets the two hosts up and runs both in turns."""
    from nodes import two_nodes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="2,16")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        return role(options.role, options.calls)

    me = [sys.executable, os.path.abspath(__file__), "--calls", str(options.calls), "--role"]
    results: list[dict[str, Any]] = []
    with two_nodes("--resource", "slot=8") as nodes:
        a, b = nodes.a, nodes.b
        for world in (int(w) for w in options.worlds.split(",")):
            for turn in range(options.turns):
                done = a.run([*me, "rayless", str(world)], env=environment(nodes.run_dir), timeout=300)
                results.append({"who": "rayless", "world": world, "turn": turn, **last_json(done.stdout)})
                folder = nodes.base / f"mq-{world}-{turn}"
                folder.mkdir()
                half = world // 2
                near = ",".join(str(r) for r in range(half))
                far = ",".join(str(r) for r in range(half, world))
                sets = [
                    host.popen([*me, "mq-workers", ranks, str(world), str(folder), host.address], env=environment())
                    for host, ranks in ((a, near), (b, far))
                ]
                done = a.run([*me, "mq", str(world), str(folder), a.address], env=environment(), timeout=300)
                results.append({"who": "MessageQueue", "world": world, "turn": turn, **last_json(done.stdout)})
                for process in sets:
                    process.wait(timeout=60)
    report(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def role(words: list[str], calls: int) -> None:
    """What this process does when it was started by the one above."""
    if words[0] == "rayless":
        drive_rayless(int(words[1]), calls)
    elif words[0] == "mq":
        drive_message_queue(int(words[1]), calls, Path(words[2]), words[3])
    else:
        message_queue_workers([int(r) for r in words[1].split(",")], int(words[2]), Path(words[3]), words[4])


def report(results: list[dict[str, Any]]) -> None:
    """Medians over the turns, and the ratio."""
    print(f"{'workers':>7} {'pacing':>13} {'':>13} {'p50 us':>8} {'p99 us':>8}")
    for world in dict.fromkeys(r["world"] for r in results):
        for pacing in ("back to back", "2 ms gap"):
            p50 = {}
            for who in ("rayless", "MessageQueue"):
                rows = [r[pacing] for r in results if r["who"] == who and r["world"] == world]
                p50[who] = statistics.median(r["p50"] for r in rows)
                p99 = statistics.median(r["p99"] for r in rows)
                print(f"{world:>7} {pacing:>13} {who:>13} {p50[who]:>8.0f} {p99:>8.0f}")
            print(f"{'':>35} {p50['MessageQueue'] / p50['rayless']:.1f}x faster")


if __name__ == "__main__":
    main()
