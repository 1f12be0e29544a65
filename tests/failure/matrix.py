"""Plays the failure matrix and writes down what was measured.

    python tests/failure/matrix.py                      all of it, into docs/failure-matrix.json and .md
    python tests/failure/matrix.py --only cut --repeats 2 --out DIR
    python tests/failure/matrix.py --lanes 10           up to ten repeats at once of what takes seconds, the rest one by one

A cell is a fault at a moment of a group's life: idle, during its start (every rank is in its constructor, as when weights load), or in a
call. Times are measured and recorded, not judged; what does not come within the patience of `stage.HANG` is a hang, and a problem.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cell import CellBase
from faults import FAULTS, Fault
from stage import HANG, Hang, Stage

RESULTS = Path("docs", "failure-matrix.json")
#: Faults that are there before a group starts under them, and in which no node may be taken for dead.
AROUND = ("loss", "delay", "flap", "busy", "disk")


@dataclass
class Cell(CellBase):
    """What was seen in a cell. Times in milliseconds, one per repeat."""

    #: From the fault until the driver's call, callback or start had the cause.
    told_ms: list[float] = field(default_factory=list)
    #: From the fault until the last process of the group was gone.
    gone_ms: list[float] = field(default_factory=list)
    #: From the end of the fault until both nodes were alive and a group answered a call.
    back_ms: list[float] = field(default_factory=list)
    #: A start that had to work, with the fault there.
    start_ms: list[float] = field(default_factory=list)
    #: The slowest of the calls made while the fault was there.
    slowest_ms: list[float] = field(default_factory=list)
    #: Calls answered while the fault was there.
    calls: int = 0
    #: Rounds of tensors that the ranks exchanged meanwhile, and the slowest of them.
    exchanged: int = 0
    exchange_ms: list[float] = field(default_factory=list)
    #: Lines of cause, as the driver got them, numbers replaced.
    lines: list[str] = field(default_factory=list)
    #: What was left of the group: a process, memfd, port or socket.
    left: list[str] = field(default_factory=list)
    #: Everything that was not as it must be.
    problems: list[str] = field(default_factory=list)

    def told(self, event: dict[str, object], since: float) -> None:
        """The driver was told of the end of its group."""
        at, line = event["time"], str(event.get("line", ""))
        assert isinstance(at, float)
        self.told_ms.append(1000 * (at - since))
        if event["ok"]:
            self.problems.append("what had to fail went on")
        elif line not in self.lines:
            self.lines.append(line)


def cells(only: str = "") -> list[tuple[Fault, str]]:
    return [(fault, moment) for fault in FAULTS for moment in fault.moments if only in f"{fault.name}-{moment}"]


def play(stage: Stage, fault: Fault, moment: str, repeats: int, cell: Cell | None = None) -> Cell:
    """Plays a cell `repeats` times on a stage with nothing on it and leaves it so, or raises `Hang`."""
    cell = cell or Cell(fault.name, moment)
    for _ in range(repeats):
        if fault.leads_to == "ends":
            _ends(stage, fault, moment, cell)
        elif fault.leads_to == "lives":
            _lives(stage, fault, moment, cell)
        else:
            _stuck(stage, fault, cell)
    return cell


def _ends(stage: Stage, fault: Fault, moment: str, cell: Cell) -> None:
    told = _begin(stage, fault, moment)
    since = fault.inject(stage)
    if fault.name == "mtu-hole":
        stage.driver.do("call", method="step", args=["x" * 300_000])
    of_driver = fault.name.startswith("driver")
    if not of_driver:
        cell.told(stage.driver.wait(told), since)
        if cell.told_ms[-1] < 1000 * fault.not_before:
            cell.problems.append(f"given up after {cell.told_ms[-1] / 1000:.1f} s, while the head vouched for the node")
    _note_gone(stage, fault, cell, since)
    undone = fault.undo(stage)
    if fault.name == "driver-stop":
        cell.told(stage.driver.wait(told), undone)
    _, left = stage.group_gone(undone)
    cell.left += [what for what in left if what not in cell.left]
    stage.wait_alive(undone)
    _note_left(stage, cell)
    _note_back(stage, cell, undone)


def _begin(stage: Stage, fault: Fault, moment: str) -> str:
    """Brings a group to the moment; returns the event by which the driver tells of its end."""
    if moment == "start":
        stage.start_loading()
        return "started"
    stage.start()
    if moment == "idle":
        return "failed"
    if fault.name.startswith("worker-exit"):
        stage.hold("leave", (stage.worker_rank("a" if fault.name.endswith("near") else "b"), 3))
    elif fault.name != "mtu-hole":
        stage.hold()
    return "called"


def _note_gone(stage: Stage, fault: Fault, cell: Cell, since: float) -> None:
    gone, left = stage.group_gone(since, fault.stays)
    if gone is None:
        cell.problems.append(f"still there after {HANG / 2:.0f} s: {', '.join(sorted(set(left)))}")
    else:
        cell.gone_ms.append(1000 * gone)


def _note_left(stage: Stage, cell: Cell) -> None:
    deadline = time.monotonic() + 5  # the daemons tidy up after a keeper a moment after its end
    while (left := stage.leftovers()) and time.monotonic() < deadline:
        time.sleep(0.02)
    cell.left += [what for what in left if what not in cell.left]


def _note_back(stage: Stage, cell: Cell, undone: float) -> None:
    stage.start()
    _one_call(stage)
    cell.back_ms.append(1000 * (time.monotonic() - undone))
    stage.driver.ask("stop", "stopped")


def _one_call(stage: Stage) -> None:
    answer = stage.driver.ask("call", "called", method="step", args=["x" * 100])
    if not answer["ok"]:
        raise Hang(f"a call on a sound group failed: {answer['line']}")


def _lives(stage: Stage, fault: Fault, moment: str, cell: Cell) -> None:
    around = fault.name.startswith(AROUND)
    before = len(stage.events())
    since = time.monotonic()
    if moment == "start" and around:
        fault.inject(stage)
        stage.start()
        cell.start_ms.append(1000 * (stage.group["time"] - since))
    elif moment == "start":
        stage.start_loading()
        fault.inject(stage)
    else:
        stage.start()
        if moment == "call":
            stage.driver.do("steps", period=0.01, size=2048, tensor=fault.tensor)
        fault.inject(stage)
    time.sleep(fault.lasts)
    undone = fault.undo(stage)
    if moment == "start" and not around:
        stage.go()
        stage.group = stage.driver.wait("started")
        if not stage.group["ok"]:
            cell.problems.append(f"the start failed: {stage.group['line']}")
    stage.wait_alive(undone)
    if stage.group["ok"]:
        stage.until(lambda: stage.group_state().endswith(str(stage.RANKS)), "the head knows the group again")
    if moment == "call":
        cell.back_ms.append(1000 * (time.monotonic() - undone))
        stage.driver.do("enough")
        stepped = stage.driver.wait("stepped")
        cell.calls += stepped["count"]
        cell.slowest_ms.append(1000 * stepped["slowest"])
        if fault.tensor:
            cell.exchanged += stepped["exchanged"]
            cell.exchange_ms.append(1000 * stepped["slowest_exchange"])
        if not stepped["ok"]:
            cell.problems.append(f"a call failed: {stepped['line']}")
    else:
        _one_call(stage)
        cell.back_ms.append(1000 * (time.monotonic() - undone))
    if failed := stage.driver.seen("failed"):
        cell.problems.append(f"the group failed: {failed['line']}")
    if around and "node-dead" in stage.events()[before:]:
        cell.problems.append("a node was declared dead")
    stage.driver.ask("stop", "stopped")
    _, left = stage.group_gone(time.monotonic())
    cell.left += [what for what in left if what not in cell.left]
    _note_left(stage, cell)


def _stuck(stage: Stage, fault: Fault, cell: Cell) -> None:
    stage.start()
    since = fault.inject(stage)
    cell.told(stage.driver.ask("call", "called", method="step", args=["x" * 100], timeout=2), since)
    undone = fault.undo(stage)
    _one_call(stage)
    cell.back_ms.append(1000 * (time.monotonic() - undone))
    stage.driver.ask("stop", "stopped")
    stage.group_gone(time.monotonic())
    _note_left(stage, cell)


def main() -> int:
    options = argparse.ArgumentParser(description="Plays the failure matrix.")
    options.add_argument("--only", default="", help="cells whose name (fault-moment) contains this")
    options.add_argument("--repeats", type=int, help="of each cell, instead of its own number")
    options.add_argument("--lanes", type=int, default=1, help="stages at once for the cells that take seconds")
    options.add_argument("--skip", default="", help="leave out the cells of the fault of this name")
    options.add_argument("--out", type=Path, default=RESULTS.parent, help="folder of failure-matrix.json and .md")
    options.add_argument("--note", default="", help="a sentence on the page: the machine, what else ran on it")
    options.add_argument("--logs", type=Path, default=Path("target", "failure-logs"), help="where logs of problems go")
    given = options.parse_args()
    found: dict[str, Cell] = {}
    file = given.out / RESULTS.name
    if file.exists():  # other cells of an earlier run stay
        found = {cell.name: cell for cell in (Cell(**one) for one in json.loads(file.read_text())["cells"])}
    given.out.mkdir(parents=True, exist_ok=True)

    def done(cell: Cell) -> None:
        found[cell.name] = cell
        write(file, list(found.values()), given.note)

    played = [(fault, moment) for fault, moment in cells(given.only) if fault.name != given.skip]
    at_once = [(fault, moment) for fault, moment in played if given.lanes > 1 and moment in fault.waits]
    bad = _at_once(at_once, given, done)
    for fault, moment in at_once:
        played.remove((fault, moment))
    return 1 if _one_by_one(played, given, done) + bad else 0


def _one_by_one(played: list[tuple[Fault, str]], given: argparse.Namespace, done: Callable[[Cell], None]) -> int:
    """Plays cells on one stage; how many were not as they must be."""
    stage: Stage | None = None
    bad = 0
    try:
        for fault, moment in played:
            stage = stage or Stage()
            cell = Cell(fault.name, moment)
            begin = time.monotonic()
            try:
                play(stage, fault, moment, given.repeats or fault.repeats, cell)
            except Hang as hang:
                cell.problems.append(str(hang))
            print(summary(cell), f"({time.monotonic() - begin:.0f} s)", flush=True)
            if cell.problems or cell.left:
                bad += 1
                stage.keep_logs(given.logs / cell.name)
                stage.close()
                stage = None
            done(cell)
    finally:
        if stage:
            stage.close()
    return bad


def _at_once(played: list[tuple[Fault, str]], given: argparse.Namespace, done: Callable[[Cell], None]) -> int:
    """Plays the repeats of cells in lanes, the longest first; how many cells were not as they must be. What saturates the cores plays by itself."""
    from lanes import Job, Lanes

    lanes = Lanes(given.logs, done)
    jobs = [Job(fault, moment) for fault, moment in played for _ in range(given.repeats or fault.repeats)]
    jobs.sort(key=lambda job: -job.fault.lasts)
    for saturates in (False, True):
        lanes.play(given.lanes, [job for job in jobs if (job.fault.name == "busy") == saturates])
    for what in lanes.problems:
        print(f"PROBLEM {what}", flush=True)
    return len(lanes.problems) + sum(bool(cell.problems or cell.left) for cell in lanes.cells.values())


def summary(cell: Cell) -> str:
    """A cell on one line."""
    words = [f"{cell.name}:"]
    for name in ("told_ms", "gone_ms", "back_ms", "start_ms", "slowest_ms"):
        if times := sorted(getattr(cell, name)):
            words.append(f"{name[:-3]} {times[len(times) // 2]:.0f}/{times[-1]:.0f}")
    if cell.calls:
        words.append(f"calls {cell.calls}")
    if cell.exchanged:
        words.append(f"exchanged {cell.exchanged}")
    words += [f"LEFT {what}" for what in cell.left] + [f"PROBLEM {what}" for what in cell.problems]
    return " ".join(words)


def write(file: Path, found: list[Cell], note: str = "") -> None:
    """The measured numbers, and the page made of them."""
    import page

    order = {f"{fault.name}-{moment}": index for index, (fault, moment) in enumerate(cells())}
    found = sorted((c for c in found if c.name in order), key=lambda c: order[c.name])
    record = {"date": time.strftime("%Y-%m-%d"), "note": note, "cells": [asdict(cell) for cell in found]}
    file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(page.text(record, FAULTS))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import matrix  # under its own name, as `lanes` knows it

    sys.exit(matrix.main())
