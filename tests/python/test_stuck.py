"""Alive but stuck: every process is well and nothing moves."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable

import pytest

import hosted
import rayless
from conftest import Cluster, Gate, gone
from rayless.exceptions import ActorDiedError, StepDeadlineError

Start = Callable[..., rayless.WorkerGroup]

DRIVER = """
import hosted, rayless
group = rayless.WorkerGroup.start(hosted.Plain, 2, strategy="SPREAD", name="to be stuck")
print(group.ranks[1].pid, flush=True)
group.call("hold_the_lock", 1)
"""


def test_a_rank_that_holds_the_lock_of_its_interpreter_is_told_with_its_stack(cluster: Cluster) -> None:
    driver = cluster.driver(DRIVER, RAYLESS_STUCK_AFTER="0.5")
    try:
        assert driver.stdout is not None
        assert driver.stderr is not None
        pid = int(driver.stdout.readline())
        told: list[str] = []
        for line in driver.stderr:
            told.append(line.rstrip())
            if "next report in" in line:
                break
        text = "\n".join(told)
        assert "rayless: to be stuck: no progress for " in text
        assert re.search(r"rank 0 on node a \(pid \d+\): waits for call 3", text), text
        assert re.search(rf"rank 1 on node b \(pid {pid}\): \d s in hold_the_lock \(call 2\)", text), text
        assert re.search(r'rank 1\|   File ".*hosted.py", line \d+ in hold_the_lock', text), text
        log = next(cluster.nodes[1].run_dir.glob("logs/*/rank-1.log"), None)
        logs = [path.read_text() for path in cluster.nodes[1].run_dir.glob("logs/*/rank-1.log")]
        assert log is not None
        assert any("rayless: no progress: " in one and "in _handle" in one and "kernel: thread " in one for one in logs)
        assert _event("ranks-stuck", "to be stuck"), rayless.status()["events"]
    finally:
        driver.kill()
        driver.communicate()


def test_a_step_over_its_deadline_ends_the_group(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    group = start(hosted.Plain, 2, strategy="SPREAD", name="late", steps=["for_ever", "add"], step_deadline=0.7)
    assert group.call("add") == [1, 1]
    with pytest.raises(StepDeadlineError, match=r"step deadline of 0\.7 s: rank 0 on node a") as caught:
        group.call("for_ever")
    assert caught.value.ranks == [0, 1]
    assert caught.value.rank == 0
    assert "in for_ever (call 3)" in str(caught.value)
    assert 'rank 1|   File "' in str(caught.value)
    with pytest.raises(ActorDiedError, match="step deadline"):
        group.call("add")
    assert gone([info.pid for info in group.ranks])
    assert "next report" not in capfd.readouterr().err, "10 s were not over"


def test_what_is_no_step_may_take_long_and_a_step_may_wait_behind_it(
    start: Start, gate: Gate, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYLESS_STUCK_AFTER", "0.5")
    monkeypatch.setenv("RAYLESS_STEP_DEADLINE", "0.5")
    group = start(hosted.Plain, 2, name="patient", steps=["add"])
    long = group.call_async("through", gate.path)
    step = group.call_async("add")
    told = ""
    deadline = time.monotonic() + 60
    while told.count("next report in") < 2:  # twice the deadline of a step is over by then
        assert time.monotonic() < deadline, told
        told += capfd.readouterr().err
    gate.open()
    assert long.result(30) == ["go", "go"]
    assert step.result(30) == [1, 1]


@pytest.mark.parametrize("number", [-1, float("nan")])
def test_a_deadline_is_a_time(number: float) -> None:
    with pytest.raises(ValueError, match=r"step_deadline=.*\nhint: "):
        rayless.WorkerGroup.start(hosted.Plain, 1, step_deadline=number)


def test_the_signal_for_stacks_ends_nobody(start: Start) -> None:
    import os

    group = start(hosted.Plain, 1)
    os.kill(group.ranks[0].pid, signal.SIGSTKFLT)  # type: ignore[attr-defined]
    assert group.call("add") == [1]


def _event(kind: str, name: str) -> bool:
    """Whether the head has heard of it; the news takes its way past keeper and daemon."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if any(event["kind"] == kind and name in event["cause"] for event in rayless.status()["events"]):
            return True
    return False
