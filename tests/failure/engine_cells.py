"""The engine cells of the failure matrix: what is seen in one, and how it is played once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from cell import CellBase
from engine_faults import ENGINE_FAULTS, EngineFault
from engine_stage import BEFORE_READY, Asker, EngineStage, Health
from stage import HANG, Hang

if TYPE_CHECKING:
    from serving import Server

#: For an answer of a few tokens under the worst of the wires; a step's own limit is 300 s.
ANSWER = 240.0


@dataclass
class EngineCell(CellBase):
    """What was seen in a cell. Times in milliseconds, one per repeat."""

    EACH: ClassVar[tuple[str, ...]] = ("codes", "problems")

    #: How often it was played.
    played: int = 0
    #: From the fault until the client's pending request failed.
    told_ms: list[float] = field(default_factory=list)
    #: Until /health was no longer 200.
    unhealthy_ms: list[float] = field(default_factory=list)
    #: Until `vllm serve` had ended.
    ended_ms: list[float] = field(default_factory=list)
    #: Until the group was reaped: its keepers and workers gone, on both hosts.
    reaped_ms: list[float] = field(default_factory=list)
    #: Until the last process of the engine was gone on both hosts, vLLM's own with it.
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
    """Those whose name (fault-moment) contains one of the words in `only`, which commas part; all without."""
    parts = only.split(",")
    return [
        (fault, moment)
        for fault in ENGINE_FAULTS
        for moment in fault.moments
        if any(part in f"{fault.name}-{moment}" for part in parts)
    ]


def play(stage: EngineStage, fault: EngineFault, moment: str, cell: EngineCell) -> EngineCell:
    """Plays a cell once. An engine that lives is left for the next one. Raises `Hang`."""
    cell.played += 1
    if fault.leads_to == "ends":
        _ends(stage, fault, moment, cell)
    else:
        _lives(stage, fault, moment, cell)
    return cell


def _server(stage: EngineStage, moment: str) -> Server:
    """An engine that starts, one that loads its weights, or one that answers."""
    if moment == "start":
        stage.begin()
    elif moment == "loading":
        stage.load()
    else:
        stage.engine()
    assert stage.server
    return stage.server


def _ends(stage: EngineStage, fault: EngineFault, moment: str, cell: EngineCell) -> None:
    asker: Asker | None = None
    server = _server(stage, moment)
    health = Health(server) if moment not in BEFORE_READY else None
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
    reaped, _ = stage.gone(since, fault.stays, group=True)
    if reaped is not None:
        cell.reaped_ms.append(1000 * reaped)
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
    starts = moment in BEFORE_READY
    if starts and fault.who == "nobody":
        cell.ready_ms.append(1000 * stage.let_load())  # the rest of the start plays under the fault
        starts = False
    else:
        time.sleep(fault.lasts)
    undone = fault.undo(stage)
    back = stage.wait_alive(undone)
    if starts:
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
    # What is left of a start is not what it takes to be back.
    cell.back_ms.append(1000 * (back if starts else time.monotonic() - undone))
    if server.get("/health") != 200:
        cell.problems.append("/health is not 200 afterwards")
    stage.until(lambda: stage.group_now()["state"] == "running", "the head knows the group as running")
    # Helpers (compilers and the like) come and go.
    cell.left += [f"ended: {p.what}" for p in stage.processes if p.what != "helper" and p.gone(0)]
    if fault.who == "nobody" and "node-dead" in stage.events()[before:]:
        cell.problems.append("a node was declared dead")


def summary(cell: EngineCell) -> str:
    """A cell on one line."""
    words = [f"{cell.name}:"]
    for name in ("told_ms", "unhealthy_ms", "ended_ms", "reaped_ms", "gone_ms", "back_ms", "slowest_ms", "ready_ms"):
        if times := sorted(getattr(cell, name)):
            words.append(f"{name[:-3]} {times[len(times) // 2]:.0f}/{times[-1]:.0f}")
    if cell.answered:
        words.append(f"answered {cell.answered}")
    for name in ("errors", "health", "causes", "lines"):
        words += [f"{name}: {text!r}" for text in getattr(cell, name)]
    words += [f"LEFT {what}" for what in cell.left] + [f"PROBLEM {what}" for what in cell.problems]
    return " ".join(words)
