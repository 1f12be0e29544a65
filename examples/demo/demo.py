#!/usr/bin/env python3
"""The main job on one machine: two hosts, one token, a real vLLM with its model cut into two stages.

``make demo`` runs it with what it needs on its paths. Two network namespaces joined by a cable (a veth pair) are the hosts;
where those are not permitted, two loopback addresses. The model is a real Llama with random weights, made here, so nothing is
downloaded and its answer has no meaning. Everything is stopped and removed at the end, whatever happens.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "setup")]

import tiny_models
from netns import hosts, unavailable
from serving import CPU_FLAGS, Cluster, Server

QUESTION = "What is a pipeline?"
# Worth a line when they first appear in the log of vLLM, and what to call them.
MILESTONES = (
    (r"Initializing a V1 LLM engine", "vLLM's engine starts"),
    (r"pipeline stage 0", "rayless has placed the stages and started a worker on each host"),
    (r"world_size=2 rank=", "the workers have found each other"),
    (r"Loading weights took|Model loading took", "weights are loaded"),
    (r"KV cache size|# GPU blocks|CPU blocks", "memory for the conversation is reserved"),
    (r"Started server process|Application startup complete", "the HTTP server is up"),
)


def say(who: str, text: str) -> None:
    """One line of the story."""
    print(f"{who:>9}  {text}", flush=True)


def milestones(log: Path) -> Callable[[float], None]:
    """Tells what is new in the log each time it is called; a line at least every 15 s, so that nobody takes it for hung."""
    seen: set[str] = set()
    last, newest = 0.0, ""

    def look(waited: float) -> None:
        nonlocal last, newest
        text = log.read_text(errors="replace")
        for pattern, meaning in MILESTONES:
            if meaning not in seen and re.search(pattern, text):
                seen.add(meaning)
                last, newest = waited, meaning
                say(f"{waited:.0f} s", meaning)
        if waited - last >= 15:
            last = waited
            say(f"{waited:.0f} s", f"… still at work ({'vLLM loads its code' if not seen else 'after: ' + newest})")

    return look


def stages(status: dict[str, Any]) -> list[str]:
    """Which stage runs where, as `rayless status --json` tells."""
    nodes = {node["id"]: node for node in status["nodes"]}
    lines = []
    for group in status["groups"]:
        if group["state"] != "running":
            continue
        for worker in sorted(group["workers"], key=lambda worker: int(worker["rank"])):
            node = nodes[worker["node"]]
            address = node["address"].rpartition(":")[0]
            lines.append(f"stage {worker['rank']} ran on {node['name']} ({address}), process {worker['pid']}")
    return lines


def main() -> int:
    """Runs the demo; 0 when the model answered."""
    parser = argparse.ArgumentParser(description="two hosts, one token, one model in two stages")
    parser.add_argument(
        "--loopback", action="store_true", help="loopback addresses as hosts, even if namespaces are permitted"
    )
    begin = time.monotonic()
    reason = "asked for" if parser.parse_args().loopback else unavailable()
    print("rayless demo: two hosts, one token, one model in two stages\n")
    say("model", "a Llama of 2.6 million random weights in four layers: it answers, but without meaning")
    model = tiny_models.ensure("llama")
    with hosts(2, loopback=reason is not None) as pair, Cluster(pair) as cluster:
        how = "network namespaces joined by a veth pair" if reason is None else f"loopback addresses: {reason}"
        say("hosts", f"host0 is {pair[0].address}, host1 is {pair[1].address} ({how})")
        say("host1", f"$ rayless join {pair[0].address}:6379        # started first: the order does not matter")
        cluster.join(1)
        say("host0", "$ rayless head")
        cluster.head(0)
        cluster.wait_alive(2)
        say("", f"both nodes are alive, {time.monotonic() - begin:.1f} s after the start\n")

        say("host0", "$ vllm serve MODEL --pipeline-parallel-size 2 --distributed-executor-backend rayless")
        flags = (*CPU_FLAGS, "--pipeline-parallel-size", "2", "--distributed-executor-backend", "rayless")
        log = cluster.base / "vllm.log"
        with Server(pair[0], cluster.environment(0), model, *flags, log=log, name="tiny-llama") as server:
            server.wait_ready(each_second=milestones(log))
            with server.client() as client:
                chat = client.chat.completions.create(
                    model="tiny-llama", messages=[{"role": "user", "content": QUESTION}], max_tokens=24, temperature=0
                )
            where = stages(cluster.status())
        print(f"\nquestion: {QUESTION}\nanswer:   {chat.choices[0].message.content!r}\n")
        for line in where:
            print(line)
    print(f"\ndone in {time.monotonic() - begin:.0f} s; both hosts, vLLM and the cluster are stopped and removed")
    return 0 if len(where) == 2 else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, TimeoutError, subprocess.SubprocessError) as error:
        print(f"\nthe demo failed: {error}", file=sys.stderr)
        sys.exit(1)
