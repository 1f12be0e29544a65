"""What a node lacks is told in one line and a hint, before weights are loaded; and the scripts of the two-host example."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import preflight_driver
import pytest

from netns import hosts, unavailable
from serving import Cluster

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def clusters() -> Iterator[Cluster]:
    """Two hosts, no daemon on them yet."""
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    with hosts(2) as pair, Cluster(pair) as cluster:
        yield cluster


def start_without(cluster: Cluster, folder: Path) -> None:
    """Head on one host; the other one joins, and to all that runs on it the folder is empty."""
    cluster.head(0)
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$1" && shift && exec "$@"', "hide", str(folder)]
    command = [*hide, *cluster.join_command(1), "--daemon"]
    cluster.hosts[1].run(command, env=cluster.environment(1))
    cluster.wait_alive(2)


def launch(cluster: Cluster, model: Path) -> str:
    """The error that a launch over both hosts gives; its workers do what they do before vLLM is imported."""
    done = preflight_driver.run(cluster, str(model))
    assert done.returncode == 1, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])["error"]


def test_both_nodes_have_all(clusters: Cluster, models: dict[str, Path]) -> None:
    clusters.head(0)
    clusters.join(1)
    clusters.wait_alive(2)
    done = preflight_driver.run(clusters, str(models["llama"]))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [place["node"] for place in found["plans"]] == ["node host0", "node host1"]
    assert [place["address"] for place in found["plans"]] == [host.address for host in clusters.hosts]


def test_a_model_that_one_node_lacks(clusters: Cluster, models: dict[str, Path]) -> None:
    start_without(clusters, models["llama"].parent)
    cause, hint = launch(clusters, models["llama"]).splitlines()
    assert cause == f"node host1 has no folder {models['llama']}"
    assert hint.startswith("hint: put the model at the same path on node host1")


def test_a_node_without_vllm(clusters: Cluster, models: dict[str, Path]) -> None:
    start_without(clusters, Path(sysconfig.get_path("purelib")))
    error = launch(clusters, models["llama"])
    assert "host1" in error
    assert "vllm" in error.lower()
    assert "\nhint: " in error


class TestTwoHostScripts:
    """With a `docker` that prints what it is told to run."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> object:
        docker = tmp_path / "bin" / "docker"
        docker.parent.mkdir()
        docker.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        docker.chmod(0o755)
        token = tmp_path / "token"
        token.write_text("rl1_secret\n")

        def run(script: str, **environment: str) -> str:
            path = f"{docker.parent}:/usr/bin:/bin"
            given = {"PATH": path, "RAYLESS_WHEEL": "/root/rayless.whl", "TOKEN_FILE": str(token), **environment}
            command = ["bash", str(REPOSITORY / "examples" / "two-hosts" / script)]
            done = subprocess.run(command, env=given, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "rl1_secret" not in done.stdout, "the token is no argument"
            return done.stdout

        return run

    def test_the_master_runs_the_head(self, run) -> None:  # type: ignore[no-untyped-def]
        told = run("master.sh")
        assert "exec rayless head --bind eth0 --token-file" in told
        assert "export NCCL_IB_GID_INDEX=1" in told
        assert "--network=host\n--gpus\nall\n--privileged\n--ulimit\nmemlock=-1\n" in told

    def test_the_worker_joins_and_serves(self, run) -> None:  # type: ignore[no-untyped-def]
        told = run(
            "worker.sh", HEAD_NODE_ADDRESS="10.0.0.1", ModelName="deepseek-ai/DeepSeek-R1", VLLM_API_KEY="sk-secret"
        )
        assert "rayless join 10.0.0.1:6379 --bind eth0" in told
        serve = told[told.index("vllm serve") :]
        for flag in ("--trust-remote-code", "--enable-chunked-prefill", "--port 8080", "--pipeline-parallel-size 2"):
            assert flag in serve
        assert "--distributed-executor-backend rayless" in serve
        assert "sk-secret" not in told
