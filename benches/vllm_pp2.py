"""vLLM with two pipeline stages on two hosts: rayless, rayless with the stages' hop left to torch (RAYLESS_PIPELINE=torch), and
vLLM's own ``mp --nnodes 2``, in one sitting.

    python benches/vllm_pp2.py [--rounds 2] [--repeats 15] [--only SIDE] [--out FILE]

Two network namespaces are the hosts; the model is the tests' tiny Llama, so nearly all of a step is what the executor and
the hop between the stages cost. The sides take turns (A B C A B C), each alone on the machine while it is measured. A figure is the
time of one step: the difference between a long and a short request, per token, so that prefill and HTTP cancel out.
Runs with the Python that ``tests/setup/vllm-env`` prints; ``rayless`` on PATH and PYTHONPATH is the one under test.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "setup")]

import tiny_models
from netns import Host, hosts
from serving import CPU_ENVIRONMENT, CPU_FLAGS, Cluster, Server

FLAGS = (*CPU_FLAGS, "--pipeline-parallel-size", "2", "--no-enable-log-requests")
SHORT, LONG = 8, 128
PROMPT = "What is a pipeline?"


@contextlib.contextmanager
def rayless(pair: list[Host], model: Path, logs: Path, pipeline: str = "rayless") -> Iterator[Server]:
    """``vllm serve`` with our executor; ``pipeline``: what joins its stages."""
    with Cluster(pair) as cluster:
        cluster.head(0)
        cluster.join(1)
        cluster.wait_alive(2)
        flags = (*FLAGS, "--distributed-executor-backend", "rayless")
        environment = cluster.environment(0, {"RAYLESS_PIPELINE": pipeline})
        with Server(pair[0], environment, model, *flags, log=logs / "rayless.log") as server:
            yield server


@contextlib.contextmanager
def multiprocess(pair: list[Host], model: Path, logs: Path) -> Iterator[Server]:
    """``vllm serve`` with vLLM's own launcher: the same command on both hosts, ranks given by hand."""
    common = [*FLAGS, "--distributed-executor-backend", "mp", "--nnodes", "2"]
    common += ["--master-addr", pair[0].address, "--master-port", "29501"]

    def environment(host: Host) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAYLESS_", "VLLM_"))}
        own = {"VLLM_HOST_IP": host.address, "GLOO_SOCKET_IFNAME": host.interface, "VLLM_PLUGINS": ""}
        return {**inherited, **CPU_ENVIRONMENT, **own}

    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *common]
    with (logs / "mp-1.log").open("wb") as out:
        second = pair[1].popen([*command, "--node-rank", "1", "--headless"], env=environment(pair[1]), stdout=out)
    try:
        flags = (*common, "--node-rank", "0")
        with Server(pair[0], environment(pair[0]), model, *flags, log=logs / "mp-0.log") as server:
            yield server
    finally:
        second.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            second.wait(20)


SIDES: dict[str, Callable[[list[Host], Path, Path], contextlib.AbstractContextManager[Server]]] = {
    "rayless": rayless,
    "rayless, hop by torch": functools.partial(rayless, pipeline="torch"),
    "mp --nnodes 2": multiprocess,
}


def step_milliseconds(server: Server, batch: int, repeats: int) -> list[float]:
    """Milliseconds per step, once per repeat."""
    with server.client() as client:

        def seconds(tokens: int) -> float:
            begin = time.perf_counter()
            client.completions.create(
                model=server.name,
                prompt=[PROMPT] * batch,
                temperature=0,
                max_tokens=tokens,
                extra_body={"ignore_eos": True},
            )
            return time.perf_counter() - begin

        seconds(LONG)  # warm: the first request of a size compiles and fills caches
        return [1000 * (seconds(LONG) - seconds(SHORT)) / (LONG - SHORT) for _ in range(repeats)]


def summary(values: list[float], digits: int = 2) -> dict[str, float]:
    """Median, extremes and count."""
    return {
        "median_ms": round(statistics.median(values), digits),
        "min_ms": round(min(values), digits),
        "max_ms": round(max(values), digits),
        "n": len(values),
    }


def main() -> None:
    """Measures, prints a table on stderr and JSON on stdout or to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="how often each side is started (default 2)")
    parser.add_argument("--repeats", type=int, default=15, help="measurements per start and batch size (default 15)")
    parser.add_argument("--only", choices=sorted(SIDES), help="one side alone")
    parser.add_argument("--out", type=Path, help="write the JSON there")
    options = parser.parse_args()

    model = tiny_models.ensure("llama")
    steps: dict[str, dict[int, list[float]]] = {}
    ready: dict[str, list[float]] = {}
    for turn in range(options.rounds):
        for name, side in SIDES.items():
            if options.only not in (None, name):
                continue
            with tempfile.TemporaryDirectory(prefix="rayless-bench-") as logs, hosts(2) as pair:
                print(f"round {turn + 1}: starting {name}", file=sys.stderr)
                with side(pair, model, Path(logs)) as server:
                    ready.setdefault(name, []).append(server.wait_ready())
                    for batch in (1, 8):
                        values = step_milliseconds(server, batch, options.repeats)
                        steps.setdefault(name, {}).setdefault(batch, []).extend(values)
                        print(f"  batch {batch}: {statistics.median(values):.2f} ms per step", file=sys.stderr)

    result: dict[str, Any] = {
        "model": model.name,
        "cores": os.cpu_count(),
        "sides": {
            name: {
                "ready_s": [round(value, 1) for value in ready[name]],
                **{f"batch_{batch}": summary(values) for batch, values in batches.items()},
            }
            for name, batches in steps.items()
        },
    }
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
