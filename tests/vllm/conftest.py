"""Real vLLM on a rayless cluster of two hosts. Starting an engine takes most of a minute on two cores, so tests share one
cluster, and engines where they can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import leftovers
import pytest

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "setup")]

import tiny_models
from netns import Host, hosts, unavailable
from serving import CPU_ENVIRONMENT, Cluster

PROMPTS = ["What is a pipeline?", "The capital of France"]
TOKENS = 24


@pytest.fixture(scope="session")
def models() -> dict[str, Path]:
    """Folders of the two tiny models."""
    return {name: tiny_models.ensure(name) for name in ("llama", "deepseek_v3")}


@pytest.fixture(scope="session")
def pair() -> Iterator[list[Host]]:
    """Two network namespaces."""
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    with hosts(2) as made:
        yield made


@pytest.fixture(scope="session")
def cluster(pair: list[Host]) -> Iterator[Cluster]:
    """The two hosts as one cluster. The second node is started before the head exists."""
    with Cluster(pair) as made:
        waiting = made.join(1)
        assert waiting.poll() is None, "a node whose head is not there yet waits"
        made.head(0)
        made.wait_alive(2)
        yield made


@pytest.fixture(scope="session")
def expected(models: dict[str, Path]) -> dict[str, list[list[int]]]:
    """Greedy tokens of each model with vLLM's own executor, in float32: on one worker, and for DeepSeek-V3 on two, too.

    A Llama gives the same tokens however it is cut. DeepSeek-V3 on vLLM's CPU build does not, under vLLM's own launcher either: in float32, one
    request a step, the log-probability of the very first token differs by 0.04 to 0.08 between one worker and two (0.02 with
    VLLM_MLA_DISABLE=1, so latent attention is not all of it), and greedy tokens part within the first five. So its tensor-parallel
    cuts are held against vLLM's own of the same width.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAYLESS_", "VLLM_"))}
    environment |= {**CPU_ENVIRONMENT, "VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    runs: list[tuple[str, str, dict[str, object]]] = [(name, str(path), {}) for name, path in models.items()]
    two: dict[str, object] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    runs.append(("deepseek_v3 TP2", str(models["deepseek_v3"]), two))
    names = leftovers.shared_memory()
    try:
        return generate(environment, runs)
    finally:
        leftovers.remove({name for name in leftovers.unused_shared_memory(names) if name.startswith("vllm_dist_")})


def generate(
    environment: dict[str, str], runs: list[tuple[str, str, dict[str, object]]], host: Host | None = None
) -> dict[str, list[list[int]]]:
    """Tokens of ``LLM(path, **options)`` for each (name, path, options), in one process, on a host if one is given."""
    command = [sys.executable, str(Path(__file__).parent / "generate.py"), json.dumps([PROMPTS, TOKENS, runs])]
    argv = host.argv(command) if host is not None else command
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=900)
    answers = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    if done.returncode != 0 or not answers:
        raise AssertionError(f"generate.py ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    tokens: dict[str, list[list[int]]] = json.loads(answers[-1].removeprefix("TOKENS "))
    return tokens
