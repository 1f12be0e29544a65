"""A driver that starts two vLLM workers and asks them what their nodes have; vLLM itself is never imported."""

from __future__ import annotations

import subprocess
import sys

from serving import Cluster


def run(cluster: Cluster, model: str) -> subprocess.CompletedProcess[str]:
    """On the first host; the last line of stdout is JSON: plans and findings, or an error (exit code 1)."""
    command = [sys.executable, "-c", f"{SCRIPT}\nmain({model!r})"]
    return cluster.hosts[0].run(command, env=cluster.environment(0), check=False)


SCRIPT = """
import json, sys
import rayless
from rayless.vllm.placement import make_plans
from rayless.vllm.preflight import compare, find
from rayless.vllm.worker import Worker

def main(model):
    try:
        config = {"config": b"", "on_cpu": True}
        group = rayless.WorkerGroup.start(Worker, 2, bundles={"CPU": 1}, strategy="STRICT_SPREAD", kwargs=config)
        with group:
            plans = make_plans(group.ranks, group.id)
            found = group.call("inspect", plans, model)
            compare([find("this driver", None), *found], model)
    except (RuntimeError, rayless.exceptions.RayError) as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(1)
    print(json.dumps({"plans": plans, "found": found}))
"""
