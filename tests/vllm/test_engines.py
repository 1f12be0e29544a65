"""Engines on two hosts: the same tokens as one worker gives, whatever the cut; nothing left behind; nothing lost with the head."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import leftovers
import pytest

from conftest import PROMPTS, TOKENS, generate
from serving import CPU_FLAGS, Cluster, Server, until

FLAGS = (*CPU_FLAGS, "--dtype", "float32", "--pipeline-parallel-size", "2", "--distributed-executor-backend", "rayless")
KEY = "sesame"


@pytest.fixture(scope="module")
def before(expected: dict[str, list[list[int]]]) -> set[str]:
    """Names in /dev/shm before any engine of ours ran."""
    return leftovers.shared_memory()


@pytest.fixture(scope="module")
def llama(cluster: Cluster, models: dict[str, Path], before: set[str]) -> Iterator[Server]:
    """A Llama in two stages, served on the head's host with a key."""
    log = cluster.base / "llama.log"
    with Server(
        cluster.hosts[0], cluster.environment(0), models["llama"], *FLAGS, log=log, name="llama", api_key=KEY
    ) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def deepseek(cluster: Cluster, models: dict[str, Path], llama: Server) -> Iterator[Server]:
    """A DeepSeek-V3 in two stages, served on the *other* host while the Llama runs: two engines at once."""
    log = cluster.base / "deepseek.log"
    with Server(
        cluster.hosts[1],
        cluster.environment(1),
        models["deepseek_v3"],
        *FLAGS,
        "--attention-backend=CPU_MLA",  # on a CPU with AMX vLLM would take one that has no float32
        log=log,
        name="deepseek",
    ) as server:
        server.wait_ready()
        yield server


def running(cluster: Cluster) -> list[dict[str, Any]]:
    return [group for group in cluster.status()["groups"] if group["state"] == "running"]


class TestLlamaInTwoStages:
    def test_stages_run_on_different_hosts_and_rank_0_on_the_drivers(self, cluster: Cluster, llama: Server) -> None:
        (group,) = running(cluster)
        names = {node["id"]: node["name"] for node in cluster.status()["nodes"]}
        places = {worker["rank"]: names[worker["node"]] for worker in group["workers"]}
        assert places == {0: "host0", 1: "host1"}

    def test_tokens_are_those_of_one_worker(self, llama: Server, expected: dict[str, list[list[int]]]) -> None:
        assert llama.greedy_tokens(PROMPTS, TOKENS) == expected["llama"]

    def test_status_shows_the_link_between_the_stages(self, cluster: Cluster, llama: Server) -> None:
        """No RDMA device on either host: TCP, and why nothing better."""
        (group,) = running(cluster)
        for index in range(2):
            found = [link for link in cluster.status(index)["links"] if link["group"] == group["id"]]
            assert [(link["from"], link["to"], link["transport"]) for link in found] == [(0, 1, "tcp")]
            assert [one["transport"] for one in found[0]["rejected"]] == ["shm", "rdma"]
            assert all(one["reason"] for one in found[0]["rejected"])

    def test_streaming_gives_the_same_text_in_pieces(self, llama: Server) -> None:
        with llama.client() as client:
            ask: dict[str, Any] = {"model": "llama", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": TOKENS}
            whole = client.completions.create(**ask).choices[0].text
            pieces = [chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True)]
        assert "".join(pieces) == whole
        assert len(pieces) > 1

    def test_chat(self, llama: Server) -> None:
        with llama.client() as client:
            made = client.chat.completions.create(
                model="llama", messages=[{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0
            )
            stream = client.chat.completions.create(
                model="llama",
                messages=[{"role": "user", "content": "Hello"}],
                max_tokens=8,
                temperature=0,
                stream=True,
            )
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert made.usage.completion_tokens == 8 or made.choices[0].finish_reason == "stop"
        assert "".join(pieces) == made.choices[0].message.content

    def test_a_wrong_key_is_refused(self, llama: Server) -> None:
        from openai import AuthenticationError

        with llama.client(api_key="wrong") as client, pytest.raises(AuthenticationError):
            client.completions.create(model="llama", prompt="Hello", max_tokens=1)

    def test_many_requests_at_once_fill_the_pipeline(self, llama: Server) -> None:
        """Up to two steps are in flight; each request gets its own answer, as when it is alone."""
        with llama.client() as client:

            def ask(prompt: str | list[str]) -> list[str]:
                made = client.completions.create(model="llama", prompt=prompt, temperature=0, max_tokens=TOKENS)
                return [choice.text for choice in made.choices]

            prompts = [f"{prompt} {number}" for number in range(8) for prompt in PROMPTS]
            assert ask(prompts) == [ask(prompt)[0] for prompt in prompts]

    def test_nothing_of_the_engine_listens_on_all_interfaces(self, cluster: Cluster, llama: Server) -> None:
        for host in cluster.hosts:
            listening = host.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"]).stdout
            # Local address, then state 0A: listening.
            addresses = {
                words[1].split(":")[0] for line in listening.splitlines() if (words := line.split())[3:4] == ["0A"]
            }
            assert not {address for address in addresses if set(address) == {"0"}}


def test_the_head_may_die_and_come_back_under_a_running_engine(cluster: Cluster, llama: Server) -> None:
    """Killed, away for a while, started again: not one request fails, and the engine is known again."""
    (group,) = running(cluster)
    answers: list[str] = []
    failures: list[BaseException] = []
    over = threading.Event()

    def ask_all_the_time() -> None:
        try:
            with llama.client() as client:
                while not over.is_set():
                    made = client.completions.create(model="llama", prompt=PROMPTS[0], temperature=0, max_tokens=8)
                    answers.append(made.choices[0].text)
        except BaseException as error:  # reported by the test, whatever it is
            failures.append(error)

    def more_answers() -> None:
        seen = len(answers)
        until(lambda: len(answers) >= seen + 5 or bool(failures), 60, "five more requests are answered")
        assert not failures, failures[0]

    asking = threading.Thread(target=ask_all_the_time)
    asking.start()
    try:
        more_answers()
        os.kill(cluster.daemon_pid(0), signal.SIGKILL)
        more_answers()
        cluster.head(0)
        cluster.wait_alive(2)
        more_answers()
    finally:
        over.set()
        asking.join(120)
    assert not failures
    assert len(set(answers)) == 1
    until(
        lambda: [found["id"] for found in running(cluster)] == [group["id"]], 30, "the group is known to the new head"
    )


class TestTwoEnginesAtOnce:
    def test_both_answer(
        self, cluster: Cluster, llama: Server, deepseek: Server, expected: dict[str, list[list[int]]]
    ) -> None:
        assert deepseek.greedy_tokens(PROMPTS, TOKENS) == expected["deepseek_v3"]
        assert llama.greedy_tokens(PROMPTS, TOKENS) == expected["llama"]
        assert len(running(cluster)) == 2

    def test_a_dead_stage_ends_its_engine_at_once_and_no_other(
        self, cluster: Cluster, llama: Server, deepseek: Server
    ) -> None:
        """The stage on the far host is killed in the middle of a request."""
        from openai import OpenAIError

        names = {node["name"]: node["id"] for node in cluster.status()["nodes"]}
        (victim,) = [group for group in running(cluster) if "deepseek" in group["name"]]
        far = next(worker for worker in victim["workers"] if worker["node"] == names["host0"])
        failed_at: list[float] = []

        def long_request() -> None:
            with deepseek.client() as client, pytest.raises(OpenAIError):
                for piece in client.completions.create(
                    model="deepseek", prompt="Hello", max_tokens=450, extra_body={"ignore_eos": True}, stream=True
                ):
                    started.set()
                    assert piece.choices
            failed_at.append(time.monotonic())

        started = threading.Event()
        asking = threading.Thread(target=long_request)
        asking.start()
        assert started.wait(60)
        os.kill(far["pid"], signal.SIGKILL)
        deepseek.process.wait(60)  # vLLM's front end ends with its engine (and calls that a regular end: code 0)
        asking.join(60)
        assert failed_at
        ended = next(group for group in cluster.status()["groups"] if group["id"] == victim["id"])
        assert ended["state"] == "failed"
        # What its keeper knows, and not what its neighbour saw of it: the end of their link.
        assert f"rank {far['rank']}" in ended["cause"]
        assert "was killed by SIGKILL" in ended["cause"]
        assert "rank" in deepseek.tail(400)
        assert llama.get("/health") == 200
        with llama.client() as client:
            assert client.completions.create(model="llama", prompt="Hello", max_tokens=1).choices


def test_a_stopped_engine_leaves_nothing(cluster: Cluster, llama: Server, deepseek: Server, before: set[str]) -> None:
    (group,) = running(cluster)
    pids = {pid for host in cluster.hosts for pid in host.pids()}
    daemons = {cluster.daemon_pid(0), cluster.daemon_pid(1)}
    assert llama.stop() == 0
    until(lambda: {pid for host in cluster.hosts for pid in host.pids()} <= daemons, 20, "only the daemons run")
    assert pids - daemons, "the engine had processes"
    # In order, and not as a group that has lost its driver.
    ended = next(found for found in cluster.status()["groups"] if found["id"] == group["id"])
    assert (ended["state"], ended["cause"]) == ("stopped", "")
    for node in cluster.status()["nodes"]:
        assert node["available"] == node["resources"]
    assert leftovers.unused_shared_memory(before) == set()


@pytest.mark.parametrize(
    "cut",
    [
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        {"tensor_parallel_size": 2},
    ],
    ids=["TP2xPP2", "TP2"],
)
def test_other_cuts_give_the_tokens_of_vllms_own_executor(
    cluster: Cluster,
    models: dict[str, Path],
    expected: dict[str, list[list[int]]],
    before: set[str],
    cut: dict[str, object],
) -> None:
    """Both models in turn, from the offline interface; each engine is stopped before the next one starts."""
    options = {**cut, "distributed_executor_backend": "rayless"}
    runs = [(name, str(path), options) for name, path in models.items()]
    wanted = {"llama": expected["llama"], "deepseek_v3": expected["deepseek_v3 TP2"]}
    assert generate(cluster.environment(0), runs, cluster.hosts[0]) == wanted
    assert running(cluster) == []
    assert leftovers.unused_shared_memory(before) == set()
