"""Two node daemons and a group inside the guest: which links go over RDMA, what status shows, and what is said where RDMA cannot be used.

Runs as root in the guest (`tests/rdma-vm/nodes`), where rxe0/rxe1 are 10.77.0.1/.2 and siw0/siw1 10.78.0.1/.2 of one network namespace; --host-id makes two
hosts of it. Plain asserts: pytest's import alone would take half a minute there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
RAYLESS = sys.argv[1]
NETS = {"rxe": "10.77.0", "siw": "10.78.0"}
#: Emulated: everything takes its time. Only ends what would fail anyway.
LIMIT = 120.0
DROP_IPC_LOCK = ["setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock", "--"]


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < deadline, f"after {LIMIT:.0f} s it is still not so that {what}"
        time.sleep(0.1)
    return found


def run(*words: str, env: dict[str, str] | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=LIMIT)
    assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


class Nodes:
    """Node `a` (the head) and node `b`, with flags and a wrapper for each."""

    def __init__(self, base: Path, kind: str, flags: dict[str, list[str]], around: dict[str, list[str]]) -> None:
        self.base, self.flags, self.around = base, flags, around
        self.address = {"a": f"{NETS[kind]}.1", "b": f"{NETS[kind]}.2"}
        base.mkdir()
        self.token = base / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(run(RAYLESS, "token", "new").stdout)

    def start(self, name: str) -> str:
        what = ["head"] if name == "a" else ["join", f"{self.address['a']}:6379", "--wait", "60"]
        common = ["--bind", self.address[name], "--name", name, "--host-id", name, "--cpus", "4", "--daemon"]
        common += ["--token-file", str(self.token), "--run-dir", str(self.base / name)]
        return run(*self.around.get(name, []), RAYLESS, *what, *common, *self.flags.get(name, [])).stderr

    def status(self) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(run(RAYLESS, "status", "--json", "--run-dir", str(self.base / "a")).stdout)
        return shown

    def node(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(node for node in self.status()["nodes"] if node["name"] == name)
        return found

    def stop(self) -> None:
        for name in ("b", "a"):
            run(RAYLESS, "stop", "--run-dir", str(self.base / name), check=False)


@contextlib.contextmanager
def nodes(base: Path, kind: str, around: dict[str, list[str]] | None = None, **flags: list[str]) -> Iterator[Nodes]:
    made = Nodes(base, kind, flags, around or {})
    try:
        made.start("a")
        made.start("b")
        yield made
    finally:
        made.stop()


@contextlib.contextmanager
def driver(of: Nodes) -> Iterator[Callable[..., Any]]:
    """`linked.py` with a rank on each node."""
    env = {**os.environ, "RAYLESS_RUN_DIR": str(of.base / "a"), "RAYLESS_WAIT": "60"}
    child = subprocess.Popen(
        [sys.executable, "linked.py"],
        cwd=TESTS / "python",
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def do(action: str, **words: Any) -> Any:
        assert child.stdin and child.stdout
        child.stdin.write(json.dumps({"do": action, **words}) + "\n")
        child.stdin.flush()
        answer = json.loads(child.stdout.readline())
        assert "ok" in answer, answer
        return answer["ok"]

    try:
        assert do("start", n=2, strategy="STRICT_SPREAD") == ["a", "b"]
        yield do
    finally:
        assert child.stdin
        child.stdin.close()
        child.wait(LIMIT)


def call(do: Callable[..., Any], method: str, *args: Any) -> Any:
    return do("call", method=method, args=args)


def links_go_over_rdma(base: Path, kind: str) -> None:
    ours = {"a": ["--rdma-device", f"{kind}0"], "b": ["--rdma-device", f"{kind}1", "--verify-links"]}
    with nodes(base, kind, **ours) as of, driver(of) as do:
        for name in ("a", "b"):
            rdma = of.node(name)["rdma"]
            shown = {device["name"]: device for device in rdma["devices"]}
            for index, device in enumerate((f"{kind}0", f"{kind}1")):
                (port,) = shown[device]["ports"]
                assert shown[device]["protocol"] == {"rxe": "roce", "siw": "iwarp"}[kind], shown
                assert (port["state"], port["address"]) == ("ACTIVE", f"{NETS[kind]}.{index + 1}"), port
                assert port["mtu"] > 1500 and port["gids"], port
            assert rdma["findings"] == [], rdma
        assert call(do, "open", 0, 1, 3, 60) == ["open", "open"]
        assert call(do, "open", 1, 0, 4, 60) == ["open", "open"]
        for size in (1, 28 << 10, 1 << 20):
            assert call(do, "move", 0, 3, size) == [True, True]
        links = until(lambda: len(shown := of.status()["links"]) == 2 and shown, "both links are shown")
        for link, own, peer in zip(links, (0, 1), (1, 0), strict=True):
            assert (link["transport"], link["state"], link["verified"]) == ("rdma", "open", True), link
            assert (link["device"], link["peer_device"]) == (f"{kind}{own}", f"{kind}{peer}"), link
            assert link["gid"] and link["peer_gid"] and link["gid"] != link["peer_gid"] and link["mtu"] > 0, link
            (rejected,) = link["rejected"]
            assert rejected["transport"] == "shm" and "two hosts" in rejected["reason"], link
        page = run(RAYLESS, "status", "--run-dir", str(of.base / "a")).stdout
        assert f"{kind}0 -> {kind}1" in page and "rdma+checksums" in page, page
        assert [link["transport"] for link in do("links")] == ["rdma", "rdma"]


def devices_that_cannot_talk_are_named(base: Path) -> None:
    ours = {"a": ["--rdma-device", "rxe0"], "b": ["--rdma-device", "siw1"]}
    with nodes(base, "siw", **ours) as of, driver(of) as do:
        for told in call(do, "open", 0, 1, 0, 60):
            assert (
                "no two devices can talk: node a has rxe0 (roce, 10.77.0.1), node b has siw1 (iwarp, 10.78.0.2)" in told
            ), told
            assert (
                "node a and node b have RDMA devices, so TCP takes --allow-tcp (RAYLESS_ALLOW_TCP=1)\nhint: " in told
            ), told
    ours["a"].append("--allow-tcp")
    with nodes(base.with_name("allowed"), "siw", **ours) as of, driver(of) as do:
        assert call(do, "open", 0, 1, 0, 60) == ["open", "open"]
        (link,) = until(lambda: of.status()["links"], "the link is shown")
        assert link["transport"] == "tcp" and "no two devices can talk" in link["rejected"][1]["reason"], link


def a_small_memlock_is_named(base: Path) -> None:
    small = ["bash", "-c", 'ulimit -l 64; exec "$@"', "-", *DROP_IPC_LOCK]
    with nodes(base, "siw", {"b": small}, b=["--transport", "rdma"]) as of, driver(of) as do:
        (finding,) = of.node("b")["rdma"]["findings"]
        what = "the memlock limit is 64 KiB and CAP_IPC_LOCK is missing; RDMA needs it unlimited"
        assert finding["fatal"] and finding["what"].startswith(what), finding
        for told in call(do, "open", 0, 1, 0, 60):
            assert f"rdma: node b: {what}" in told and "tcp: only rdma is allowed" in told, told


def hidden_device_files_are_named(base: Path) -> None:
    hidden = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/infiniband && exec "$@"', "-"]
    with nodes(base, "siw", {"b": hidden}) as of:
        whats = [finding["what"] for finding in of.node("b")["rdma"]["findings"]]
        assert [what.split(" cannot be opened")[0] for what in whats] == [
            "/dev/infiniband/uverbs0",
            "/dev/infiniband/rdma_cm",
        ], whats
        assert of.node("a")["rdma"]["findings"] == []


def an_unknown_device_is_refused(base: Path) -> None:
    words = ["head", "--bind", "10.78.0.1", "--run-dir", str(base), "--rdma-device", "mlx5_0"]
    done = run(RAYLESS, *words, check=False)
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: --rdma-device mlx5_0: this host has rxe0, rxe1, siw0, siw1\nhint: "), done


def main() -> None:
    base = Path("/tmp/rayless-nodes")
    base.mkdir()
    stories: list[tuple[str, Callable[[Path], None]]] = [
        ("links go over soft-iWARP", lambda at: links_go_over_rdma(at, "siw")),
        ("links go over soft-RoCE", lambda at: links_go_over_rdma(at, "rxe")),
        ("devices that cannot talk are named", devices_that_cannot_talk_are_named),
        ("a small memlock limit is named", a_small_memlock_is_named),
        ("hidden device files are named", hidden_device_files_are_named),
        ("an unknown device is refused", an_unknown_device_is_refused),
    ]
    for number, (name, story) in enumerate(stories):
        begin = time.monotonic()
        story(base / str(number))
        print(f"ok {time.monotonic() - begin:6.1f} s  {name}", flush=True)


main()
