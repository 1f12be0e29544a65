"""Plays the engine cells of the failure matrix, with real vLLM, and writes down what was measured.

    python tests/failure/engines.py                            all of it, three times, into docs/failure-matrix-engines.json and .md
    python tests/failure/engines.py --only cut --repeats 1 --out DIR

A cell is a fault at a moment of an engine's life: both ranks about to load weights, in the middle of a long streamed answer, idle. Cells that
the engine outlives share it. Times are recorded, not judged; what does not come within the patience is a problem.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine_faults import ENGINE_FAULTS, EngineFault
from engine_stage import CLOCK_LIBRARY, Asker, EngineStage, Health
from stage import HANG, Hang

if TYPE_CHECKING:
    from serving import Server

RESULTS = Path("docs", "failure-matrix-engines.json")
#: For an answer of a few tokens under the worst of the wires; a step's own limit is 300 s.
ANSWER = 240.0


@dataclass
class EngineCell:
    """What was seen in a cell. Times in milliseconds, one per repeat."""

    fault: str
    moment: str
    #: From the fault until the client's pending request failed.
    told_ms: list[float] = field(default_factory=list)
    #: Until /health was no longer 200.
    unhealthy_ms: list[float] = field(default_factory=list)
    #: Until `vllm serve` had ended.
    ended_ms: list[float] = field(default_factory=list)
    #: Until the last process of the engine was gone on both hosts.
    gone_ms: list[float] = field(default_factory=list)
    #: From the end of the fault until both nodes were alive and nothing was held (ends) or the next request was answered (lives).
    back_ms: list[float] = field(default_factory=list)
    #: Requests answered while the fault was there, and the slowest.
    answered: int = 0
    slowest_ms: list[float] = field(default_factory=list)
    #: From the start of an engine that was hit while loading until it was ready.
    ready_ms: list[float] = field(default_factory=list)
    #: The client's words, those of /health, those of the head about the group, those of the executor in the server's log.
    errors: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def _add(where: list[str], what: str) -> None:
    if what and what not in where:
        where.append(what)


def cells(only: str = "") -> list[tuple[EngineFault, str]]:
    parts = only.split(",")
    return [
        (f, moment)
        for f in ENGINE_FAULTS
        for moment in f.moments
        if any(part in f"{f.name}-{moment}" for part in parts)
    ]


def play(stage: EngineStage, fault: EngineFault, moment: str, cell: EngineCell) -> EngineCell:
    """Plays a cell once. An engine that lives is left for the next one. Raises `Hang`."""
    if fault.leads_to == "ends":
        _ends(stage, fault, moment, cell)
    else:
        _lives(stage, fault, moment, cell)
    return cell


def _server(stage: EngineStage, moment: str) -> Server:
    """An engine that loads its weights, or one that answers."""
    if moment == "loading":
        stage.load()
    else:
        stage.engine()
    assert stage.server
    return stage.server


def _ends(stage: EngineStage, fault: EngineFault, moment: str, cell: EngineCell) -> None:
    asker: Asker | None = None
    server = _server(stage, moment)
    health = Health(server) if moment != "loading" else None
    if moment == "request":
        asker = Asker(server, long=True)
        if not asker.under_way.wait(ANSWER):
            raise Hang("the long request did not begin")
    since = fault.inject(stage)
    if fault.mute:
        # Nobody is there to tell anyone; what can end has to.
        _note_gone(stage, fault, cell, since)
        undone = since = fault.undo(stage)
    if asker is not None:
        failed = asker.wait_failed(HANG)
        if failed is None:
            cell.problems.append("the request neither failed nor ended")
        else:
            cell.told_ms.append(1000 * (failed[0] - since))
            _add(cell.errors, failed[1].splitlines()[0])
    if health is not None:
        bad = health.wait_bad(HANG)
        health.stop()
        if bad is None:
            cell.problems.append("/health went on saying 200")
        else:
            cell.unhealthy_ms.append(1000 * max(0.0, bad[0] - since))
            _add(cell.health, bad[1])
    if not fault.mute:
        _note_gone(stage, fault, cell, since)
        undone = fault.undo(stage)
    try:
        cell.codes.append(server.process.wait(HANG))
    except Exception as error:
        raise Hang(f"`vllm serve` did not end: {error}") from error
    cell.ended_ms.append(1000 * (time.monotonic() - since))
    _, left = stage.gone(undone)
    cell.left += [what for what in left if what not in cell.left]
    _add(cell.lines, stage.engine_line())
    _note_end(stage, fault, cell, undone)
    stage.end_engine()


def _note_gone(stage: EngineStage, fault: EngineFault, cell: EngineCell, since: float) -> None:
    gone, left = stage.gone(since, fault.stays)
    if gone is None:
        cell.problems.append(f"still there after {HANG:.0f} s: {', '.join(sorted(set(left)))}")
    else:
        cell.gone_ms.append(1000 * gone)


def _note_end(stage: EngineStage, fault: EngineFault, cell: EngineCell, undone: float) -> None:
    """The nodes, what is held, and what the head says of the group."""
    stage.wait_alive(undone)
    deadline = time.monotonic() + 10
    while (left := stage.leftovers()) and time.monotonic() < deadline:
        time.sleep(0.02)
    cell.back_ms.append(1000 * (time.monotonic() - undone))
    cell.left += [what for what in left if what not in cell.left]
    group = stage.group_now()
    _add(cell.causes, group["cause"])
    if fault.state and group["state"] != fault.state:
        cell.problems.append(f"the group counts as {group['state']} ({group['cause']})")
    if fault.line and not any(word in group["cause"].lower() for word in map(str.lower, fault.line)):
        cell.problems.append(f"the cause says nothing of it: {group['cause']}")


def _lives(stage: EngineStage, fault: EngineFault, moment: str, cell: EngineCell) -> None:
    asker: Asker | None = None
    server = _server(stage, moment)
    before = len(stage.events())
    if moment == "request":
        asker = Asker(server, long=False)
        if not asker.under_way.wait(ANSWER):
            raise Hang("no request was answered")
    fault.inject(stage)
    if moment == "loading" and fault.name.startswith(("loss", "delay", "flap", "disk", "clock", "busy")):
        cell.ready_ms.append(1000 * stage.let_load())  # the rest of the start plays under the fault
    else:
        time.sleep(fault.lasts)
    undone = fault.undo(stage)
    stage.wait_alive(undone)
    if moment == "loading" and not cell.ready_ms[len(cell.back_ms) :]:
        cell.ready_ms.append(1000 * stage.let_load())
    if asker is not None:
        if not asker.stop(ANSWER):
            raise Hang("a request was neither answered nor refused")
        cell.answered += asker.answered
        cell.slowest_ms.append(1000 * asker.slowest)
        if asker.failed:
            cell.problems.append(f"a request failed: {asker.failed[1].splitlines()[0]}")
    one = Asker(server, long=False)
    if not one.under_way.wait(HANG) or not one.stop(HANG) or one.failed:
        cell.problems.append(f"no answer afterwards: {one.failed}")
    cell.back_ms.append(1000 * (time.monotonic() - undone))
    if server.get("/health") != 200:
        cell.problems.append("/health is not 200 afterwards")
    stage.until(lambda: stage.group_now()["state"] == "running", "the head knows the group as running")
    cell.left += [f"ended: {process.what}" for process in stage.processes if process.gone(0)]
    if fault.who == "nobody" and "node-dead" in stage.events()[before:]:
        cell.problems.append("a node was declared dead")


def main() -> int:
    options = argparse.ArgumentParser(description="Plays the engine cells of the failure matrix.")
    options.add_argument("--only", default="", help="cells whose name (fault-moment) contains one of these (by commas)")
    options.add_argument("--repeats", type=int, default=3, help="of each cell")
    options.add_argument("--out", type=Path, default=RESULTS.parent, help="folder of the .json and the .md")
    options.add_argument("--note", default="", help="a sentence on the page: the machine, what else ran on it")
    options.add_argument("--logs", type=Path, default=Path("target", "failure-logs"), help="where logs of problems go")
    given = options.parse_args()
    if not CLOCK_LIBRARY.exists():
        print(f"no {CLOCK_LIBRARY}: clocks are left alone\nhint: apt-get install faketime", file=sys.stderr)
    found: dict[str, EngineCell] = {}
    file = given.out / RESULTS.name
    if file.exists():  # other cells of an earlier run stay
        found = {
            f"{cell['fault']}-{cell['moment']}": EngineCell(**cell) for cell in json.loads(file.read_text())["cells"]
        }
    wanted = [one for one in cells(given.only) if CLOCK_LIBRARY.exists() or not one[0].name.startswith("clock")]
    for fault, moment in wanted:
        found[f"{fault.name}-{moment}"] = EngineCell(fault.name, moment)
    stage: EngineStage | None = None
    try:
        for round_ in range(given.repeats):
            for fault, moment in wanted:
                name = f"{fault.name}-{moment}"
                cell = found[name]
                begin, problems = time.monotonic(), len(cell.problems) + len(cell.left)
                try:
                    stage = stage or EngineStage()
                    play(stage, fault, moment, cell)
                except (Hang, RuntimeError, TimeoutError, OSError) as error:
                    cell.problems.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
                print(f"{round_ + 1}:", summary(cell), f"({time.monotonic() - begin:.0f} s)", flush=True)
                if len(cell.problems) + len(cell.left) > problems and stage is not None:
                    stage.keep_logs(given.logs / f"engine-{name}")
                    stage.close()
                    stage = None
                given.out.mkdir(parents=True, exist_ok=True)
                write(file, list(found.values()), given.note)
    finally:
        if stage:
            stage.close()
    return 1 if any(found[f"{f.name}-{m}"].problems or found[f"{f.name}-{m}"].left for f, m in wanted) else 0


def summary(cell: EngineCell) -> str:
    """A cell on one line."""
    words = [f"{cell.fault}-{cell.moment}:"]
    for name in ("told_ms", "unhealthy_ms", "ended_ms", "gone_ms", "back_ms", "slowest_ms", "ready_ms"):
        if times := sorted(getattr(cell, name)):
            words.append(f"{name[:-3]} {times[len(times) // 2]:.0f}/{times[-1]:.0f}")
    if cell.answered:
        words.append(f"answered {cell.answered}")
    for name in ("errors", "health", "causes", "lines"):
        words += [f"{name}: {text!r}" for text in getattr(cell, name)]
    words += [f"LEFT {what}" for what in cell.left] + [f"PROBLEM {what}" for what in cell.problems]
    return " ".join(words)


def write(file: Path, found: list[EngineCell], note: str) -> None:
    """The measured numbers, and the page made of them."""
    import engine_page

    order = {f"{fault.name}-{moment}": index for index, (fault, moment) in enumerate(cells())}
    found = sorted((c for c in found if f"{c.fault}-{c.moment}" in order), key=lambda c: order[f"{c.fault}-{c.moment}"])
    record = {"date": time.strftime("%Y-%m-%d"), "note": note, "cells": [asdict(cell) for cell in found]}
    file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(engine_page.text(record))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(main())
