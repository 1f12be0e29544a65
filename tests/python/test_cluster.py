"""``init``, the state of the cluster, and what a launch waits for."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import hosted
import rayless
from conftest import RAYLESS, Cluster, Node, environment, gone
from netns import hosts
from rayless import _report, _runtime
from rayless.exceptions import ClusterNotFoundError, LaunchError, PlacementError, RayError, WorkerDiedError


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a launch of this process has said what it waits for."""
    said = threading.Event()
    original = _report.Reporter.waiting

    def waiting(self: _report.Reporter, text: str) -> None:
        original(self, text)
        said.set()

    monkeypatch.setattr(_report.Reporter, "waiting", waiting)
    return said


def test_no_daemon_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLESS_RUN_DIR", str(tmp_path))
    for attempt in (rayless.init, rayless.nodes, lambda: rayless.WorkerGroup.start(hosted.Plain, 1)):
        with pytest.raises(ClusterNotFoundError, match=r"no rayless daemon answers.*\nhint: start one with"):
            attempt()
    assert not rayless.is_initialized()
    assert issubclass(ClusterNotFoundError, ConnectionError)


def test_init_finds_the_daemon_of_this_host(cluster: Cluster) -> None:
    assert not rayless.is_initialized()
    found = rayless.init()
    assert found["name"] == "a"
    assert rayless.is_initialized()
    with pytest.raises(RayError, match=r"called twice\nhint: "):
        rayless.init()
    assert rayless.init(ignore_reinit_error=True)["node"] == found["node"]
    rayless.shutdown()
    rayless.shutdown()
    assert not rayless.is_initialized()
    head = f"{cluster.nodes[0].address}:6379"
    assert rayless.init(head)["is_head"]
    rayless.shutdown()
    with pytest.raises(ClusterNotFoundError, match=r"not of 10.0.0.99:6379\nhint: "):
        rayless.init("10.0.0.99:6379")
    with pytest.raises(ValueError, match="local=True"):
        rayless.init(num_cpus=2)


def test_nodes_and_resources_have_rays_shape(cluster: Cluster) -> None:
    by_name = {node["NodeName"]: node for node in rayless.nodes()}
    assert set(by_name) == {"a", "b"}
    for node, daemon in zip((by_name["a"], by_name["b"]), cluster.nodes, strict=True):
        assert node["Alive"]
        assert node["NodeManagerAddress"] == daemon.address
        assert node["NodeManagerPort"] == 6379
        assert node["Resources"]["CPU"] == 8.0
        assert node["Resources"]["GPU"] == 2.0
    assert rayless.cluster_resources()["CPU"] == 16.0
    assert rayless.available_resources()["GPU"] == 4.0
    assert rayless.get_runtime_context().get_node_id() == by_name["a"]["NodeID"]


def test_a_rank_sees_its_gpus_only(cluster: Cluster, start: Callable[..., rayless.WorkerGroup]) -> None:
    def visible(_: object) -> str | None:
        import os

        return os.environ.get("CUDA_VISIBLE_DEVICES")

    group = start(hosted.Plain, 2, bundles={"GPU": 2})
    assert group.call(visible) == [",".join(map(str, info.gpus)) for info in group.ranks]
    group.stop()
    by_hand = start(hosted.Plain, 1, bundles={"GPU": 1}, env={"CUDA_VISIBLE_DEVICES": "7"})
    assert by_hand.call(visible) == ["7"]
    by_hand.stop()
    assert start(hosted.Plain, 1, bundles={"CPU": 1}).call(visible) == [None]


def test_fractions_of_a_gpu(cluster: Cluster, start: Callable[..., rayless.WorkerGroup]) -> None:
    group = start(hosted.Plain, 4, bundles={"GPU": 0.5, "CPU": 0.25}, strategy="STRICT_PACK")
    assert [info.gpus for info in group.ranks] == [[0], [0], [1], [1]] or sorted(
        info.gpus[0] for info in group.ranks
    ) == [0, 0, 1, 1]
    held = group.call(lambda _: rayless.get_runtime_context().get_accelerator_ids()["GPU"])
    assert held == [[str(info.gpus[0])] for info in group.ranks]
    assert rayless.available_resources()["GPU"] == 2.0
    assert rayless.available_resources()["CPU"] == 15.0
    group.stop()
    assert rayless.available_resources()["CPU"] == 16.0


def test_wait_zero_refuses_at_once_with_the_table(cluster: Cluster, start: Callable[..., rayless.WorkerGroup]) -> None:
    holder = start(hosted.Plain, 1, bundles={"GPU": 2}, name="holder")
    with pytest.raises(PlacementError) as caught:
        start(hosted.Plain, 4, bundles={"GPU": 1}, wait=0)
    cause, hint, *table = str(caught.value).splitlines()
    assert "GPU" in cause
    assert cause not in table
    assert hint.startswith("hint: ")
    shown = "\n".join(table)
    assert "GPU 4 in 4 bundles" in shown
    assert "holder" in shown, "who has them"
    for node in ("a", "b"):
        assert any(line.split()[:2] == [node, "alive"] for line in table)
    holder.stop()


def test_a_launch_waits_and_says_for_what(
    start: Callable[..., rayless.WorkerGroup], waited: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    holder = start(hosted.Plain, 1, bundles={"GPU": 2}, name="holder")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        launch = pool.submit(start, hosted.Plain, 2, bundles={"GPU": 2}, wait=60)
        assert waited.wait(30)
        assert not launch.done()
        holder.stop()
        group = launch.result(60)
    assert {info.node_name for info in group.ranks} == {"a", "b"}
    err = capfd.readouterr().err
    assert "rayless: waiting: " in err
    assert "holder" in err, "who has them"


def test_two_groups_share_the_cluster(cluster: Cluster, start: Callable[..., rayless.WorkerGroup]) -> None:
    first = start(hosted.Plain, 2, name="first")
    second = start(hosted.Plain, 3, name="second", args=(100,))
    assert first.call("add") == [1, 1]
    assert second.call("add") == [101] * 3
    shown = {group["name"]: group for group in rayless.status()["groups"] if group["state"] == "running"}
    assert shown["first"]["id"] == first.id
    assert [worker["pid"] for worker in shown["second"]["workers"]] == [info.pid for info in second.ranks]
    first.stop()
    assert second.call("add") == [102] * 3


def test_what_a_worker_gets(
    cluster: Cluster, start: Callable[..., rayless.WorkerGroup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's interpreter, path, folder and environment, less the published list; the node's own values win."""
    (tmp_path / "only_here.py").write_text("VALUE = 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CARRIED", "yes")
    monkeypatch.setenv("WORLD_SIZE", "99")
    monkeypatch.setenv("RAYLESS_TOKEN", "rl1_secret")
    group = start(hosted.Plain, 2, strategy="SPREAD", env={"EXTRA": "1"}, rank_env=[{"MINE": "a"}, {"MINE": "b"}])
    for executable, folder, path in group.call("interpreter"):
        assert executable == sys.executable
        assert Path(folder) == tmp_path
        assert str(tmp_path) in path
    assert group.call(lambda _: __import__("only_here").VALUE) == [42, 42]
    assert group.call("environ", "CARRIED", "WORLD_SIZE", "RAYLESS_TOKEN", "EXTRA") == [["yes", None, None, "1"]] * 2
    assert group.call("environ", "MINE", "RAYLESS_RANK", "RAYLESS_WORLD_SIZE") == [["a", "0", "2"], ["b", "1", "2"]]
    assert group.call("environ", "RAYLESS_GROUP", "RAYLESS_NODE_ID") == [
        [group.id, info.node_id] for info in group.ranks
    ]
    for info, (address,) in zip(group.ranks, group.call("environ", "VLLM_HOST_IP"), strict=True):
        assert address == info.node_env["VLLM_HOST_IP"] == info.address


def test_an_interpreter_that_is_missing_is_named(start: Callable[..., rayless.WorkerGroup]) -> None:
    with pytest.raises(LaunchError, match=r"cannot start /nowhere/python: .*\nhint: install that interpreter on node"):
        start(hosted.Plain, 2, python="/nowhere/python")


def test_a_worker_that_does_not_come_up_ends_the_start(start: Callable[..., rayless.WorkerGroup]) -> None:
    with pytest.raises(WorkerDiedError, match="exited with code 1"):
        start(hosted.Plain, 2, python="/bin/false")
    assert start(hosted.Plain, 2).call("add") == [1, 1]


def test_a_folder_that_is_gone_is_said(
    start: Callable[..., rayless.WorkerGroup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "short-lived"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(LaunchError, match="working directory of this process is gone\nhint: "):
        start(hosted.Plain, 1)


def test_output_of_workers_shows_at_the_driver(cluster: Cluster) -> None:
    code = """
import hosted, rayless
group = rayless.WorkerGroup.start(hosted.Plain, 2, strategy="SPREAD")
group.call("say", "hello from afar")
input()
group.stop()
"""
    driver = cluster.driver(code)
    assert driver.stderr is not None
    expected = {"(rank 0, a) hello from afar", "(rank 1, b) hello from afar"}
    while expected:  # ends with the lines, or with the driver
        line = driver.stderr.readline()
        assert line, f"not shown: {expected}"
        expected.discard(line.rstrip())
    assert driver.communicate("\n", timeout=60)[0] == ""
    assert driver.returncode == 0
    quiet = cluster.driver(code, RAYLESS_LOG_TO_DRIVER="0")
    _, err = quiet.communicate("\n", timeout=60)
    assert quiet.returncode == 0
    assert "hello" not in err


def test_classes_of_main_travel(cluster: Cluster) -> None:
    code = """
import rayless

class Mine:
    def __init__(self, other): self.other = other
    def swap(self, other): before, self.other = self.other, other; return before

class Other:
    def __init__(self, value): self.value = value

class Oops(Exception): pass

def oops(mine): raise Oops(mine.other.value)

group = rayless.WorkerGroup.start(Mine, 2, args=(Other(1),))
before = group.call("swap", Other(2))
print([type(each) is Other for each in before], [each.value for each in before])
try:
    group.call(oops)
except Oops as error:
    print("caught", error.rank in (0, 1), error.args[0])
"""
    out, err = cluster.driver(code).communicate(timeout=60)
    assert out.splitlines() == ["[True, True] [1, 1]", "caught True 2"], err


def test_a_cluster_of_ones_own() -> None:
    """``init(local=True)`` starts one, and shutdown ends it."""
    rayless.init(local=True, num_cpus=3, num_gpus=1, resources={"slot": 2})
    try:
        assert rayless.cluster_resources() == pytest.approx(
            {**rayless.cluster_resources(), "CPU": 3.0, "GPU": 1.0, "slot": 2.0}
        )
        group = rayless.WorkerGroup.start(hosted.Plain, 2, bundles={"slot": 1})
        pids = [info.pid for info in group.ranks]
        assert group.call("add") == [1, 1]
        run_dir = _runtime.current().run_dir
    finally:
        rayless.shutdown()
    assert gone(pids)
    assert not os.path.exists(run_dir)


def test_links_of_a_group_without_any(cluster: Cluster, start: Callable[..., rayless.WorkerGroup]) -> None:
    assert start(hosted.Plain, 1).links() == []


def test_driver_on_either_node(cluster: Cluster) -> None:
    code = """
import hosted, rayless
group = rayless.WorkerGroup.start(hosted.Plain, 2, strategy="SPREAD")
print([info.node_name for info in group.ranks], group.call("add"))
"""
    out, err = cluster.driver(code, run_dir=str(cluster.nodes[1].run_dir)).communicate(timeout=60)
    assert out.strip() == "['b', 'a'] [1, 1]", err


def test_a_launch_before_there_is_a_head_waits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    """Any order: first the node, then the launch, then the head."""
    with hosts(2, loopback=True) as (head_host, node_host):
        head, node = Node("a", head_host.address, tmp_path / "a"), Node("b", node_host.address, tmp_path / "b")
        token = tmp_path / "token"
        token.write_text(Node("", "", tmp_path).command("token", "new").stdout)
        token.chmod(0o600)
        common = ["--token-file", str(token), "--cpus", "4", "--gpus", "0"]
        where = f"{head.address}:6379"
        joining = subprocess.Popen(
            [
                RAYLESS or "",
                "join",
                where,
                "--bind",
                node.address,
                "--name",
                "b",
                "--run-dir",
                str(node.run_dir),
                *common,
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        try:
            assert joining.stderr is not None
            assert "waiting for the head" in joining.stderr.readline()
            monkeypatch.setenv("RAYLESS_RUN_DIR", str(node.run_dir))
            with pytest.raises(ClusterNotFoundError, match=r"\nhint: "):
                rayless.WorkerGroup.start(hosted.Plain, 1, wait=0)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                launch = pool.submit(rayless.WorkerGroup.start, hosted.Plain, 2, strategy="STRICT_SPREAD", wait=60)
                assert waited.wait(30)
                assert "rayless: waiting: " in capfd.readouterr().err
                head.command("head", "--bind", head.address, "--name", "a", "--daemon", *common)
                group = launch.result(60)
            assert [info.node_name for info in group.ranks] == ["b", "a"]
            assert group.call("add") == [1, 1]
        finally:
            rayless.shutdown()
            node.command("stop", check=False)
            head.command("stop", check=False)
            joining.communicate(timeout=30)
