"""`rayless report` of a cluster: what one file holds of both nodes, and what it says of one that hangs."""

from __future__ import annotations

import contextlib
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stage import Stage

pytestmark = pytest.mark.quick

OTHERS = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def stage(stages: Callable[..., Stage]) -> Iterator[Stage]:
    """A stage with a group of two ranks on each host. It is not used again: its ranks print the token into their logs."""
    stage = stages()
    try:
        stage.start()
        yield stage
        stage.driver.ask("stop", "stopped")
        stage.wait_alive(0)
    finally:
        stages(give_up=True)


def report(stage: Stage, path: Path) -> tuple[dict[str, str], str]:
    """Made on host a: name without the folder to content, and what was said on stderr."""
    cluster = stage.cluster
    command = [cluster.rayless, "report", "--run-dir", str(cluster.run_dir(0)), "--output", str(path)]
    done = stage.a.run(command, env=cluster.environment(0, {"RAYLESS_TOKEN": cluster.token_file.read_text().strip()}))
    assert done.stdout.strip() == str(path)
    with tarfile.open(path) as archive:
        files = {member.name: archive.extractfile(member) for member in archive}
        return {
            name.split("/", 1)[1]: (file.read().decode() if file else "") for name, file in files.items()
        }, done.stderr


def test_one_file_holds_both_nodes_and_no_secret(stage: Stage, tmp_path: Path) -> None:
    token = stage.cluster.token_file.read_text().strip()
    group = stage.group["group"]
    stage.driver.do("call", method="say", args=[f"joined with {token} HF_TOKEN={OTHERS}"])
    assert stage.driver.wait("called")["ok"]
    stage.hold()
    files, said = report(stage, tmp_path / "report.tar.gz")
    assert said == ""
    assert "nothing is missing" in files["README.txt"]
    (other,) = {name.split("/")[1] for name in files if name.startswith("nodes/")}
    assert other.startswith("host1-")
    for index, folder in enumerate(("", f"nodes/{other}/")):
        for rank in (rank["rank"] for rank in stage.group["ranks"] if rank["node"] == f"host{index}"):
            # The line of Python that the rank is in, and what it printed, without the secrets.
            stacks = files[f"{folder}stacks-{group}.txt"]
            assert f"=== rank {rank} (pid " in stacks
            assert "in hold" in stacks
            log = files[f"{folder}logs/{group}/rank-{rank}.log"]
            assert "joined with rl1_[removed] HF_TOKEN=hf_[removed]" in log
        assert f"keeper of group {group}" in files[f"{folder}processes.txt"]
        assert stage.cluster.hosts[index].address in files[f"{folder}network.txt"]
    assert "member of the cluster" in files["logs/daemon.log"]
    for name, content in files.items():
        assert token not in content, name
        assert OTHERS not in content, name
    # The process that made the other part is gone.
    with contextlib.closing(stage.daemon("b")) as daemon:
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
        commands = [Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0") for child in children]
        assert all(command[1] == b"keeper" for command in commands), commands


def test_a_node_that_hangs_is_named_and_costs_its_part_only(stage: Stage, tmp_path: Path) -> None:
    group = stage.group["group"]
    with contextlib.closing(stage.daemon("b")) as daemon:
        daemon.signal(signal.SIGSTOP)
        try:
            files, said = report(stage, tmp_path / "report.tar.gz")
        finally:
            daemon.signal(signal.SIGCONT)
    assert said.startswith("missing: node host1 (with rank "), said
    assert f" of group {group}): " in said
    assert "`rayless report --local` there makes its part" in said
    assert said.strip() in files["README.txt"]
    assert not [name for name in files if name.startswith("nodes/")]
    assert "=== rank " in files[f"stacks-{group}.txt"]
