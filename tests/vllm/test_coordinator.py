"""vLLM's own pipeline group over links: the same dicts, in order, and nothing of it through torch.distributed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from netns import Host
from serving import Cluster

PROGRAM = Path(__file__).parent / "coordinator.py"


@pytest.fixture(scope="module")
def wide(pair: list[Host]) -> Any:
    """The two hosts with room for two ranks each; no engine runs here."""
    with Cluster(pair, cpus=2) as made:
        made.head(0)
        made.join(1)
        made.wait_alive(2)
        yield made


def run(cluster: Cluster, *flags: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(PROGRAM), *flags]
    done = cluster.hosts[0].run(command, env=cluster.environment(0), check=False, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{(done.stderr or '')[-6000:]}"
    reports: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["reports"]
    return reports


def ends(reports: list[dict[str, Any]]) -> set[tuple[int, int, int]]:
    return {(link["from"], link["to"], link["channel"]) for report in reports for link in report["links"]}


def test_two_stages_on_two_hosts(wide: Cluster) -> None:
    """Blocking and asynchronous calls, sampled tokens, and a step that one side missed."""
    first, second = reports = run(wide)
    assert ends(reports) == {(0, 1, 0), (1, 0, 1)}
    for report in reports:
        assert {link["transport"] for link in report["links"]} == {"tcp"}, "two hosts without an RDMA device"
        assert report["torch"] == {"barrier": 1}, "only what the report itself asked for"
    sent, received = first["links"][0], second["links"][0]
    assert sent["messages"] == received["messages"]
    assert sent["bytes"] == received["bytes"]
    assert "rank 1 is at step" in second["crossed"]
    assert "but rank 0 sent step" in second["crossed"]


def test_two_stages_of_two_ranks_send_each_byte_once(wide: Cluster) -> None:
    narrow = run(wide)[0]["links"][0]
    reports = run(wide, "--tensor", "2")
    assert ends(reports) == {(0, 2, 0), (1, 3, 0), (2, 0, 1), (3, 1, 1)}
    shares = [report["links"][0]["bytes"] for report in reports[:2]]
    # What does not divide by two is sent by both: the mask, the ids and the scalar.
    assert sum(shares) < 1.1 * narrow["bytes"] + 2 * 1_100_000, "each rank's link proves itself by a megabyte"


def test_the_last_of_three_stages_tells_both_others_its_tokens(wide: Cluster) -> None:
    reports = run(wide, "--stages", "3")
    assert ends(reports) == {(0, 1, 0), (1, 2, 0), (2, 0, 1), (2, 1, 1)}
    transports = {(link["from"], link["to"]): link["transport"] for report in reports for link in report["links"]}
    assert transports[0, 1] == "shm", "two ranks of one host"
    assert transports[1, 2] == "tcp"
