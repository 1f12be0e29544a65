"""docs/failure-matrix-engines.md, made of what a run measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from engine_faults import BY_NAME, SILENT
from engine_stage import BEFORE_READY, MOMENTS
from page import span

#: When clients must know.
KNOWN_WITHIN_MS = {"worker-kill-near": 50, "worker-kill-far": 100, "worker-exit": 100}

HEAD = """# Failure matrix: engines

Made by `tests/failure/engines.py`; do not edit. Real vLLM serves a tiny Llama in two pipeline stages, stage 0 and `vllm serve` on host a with the head,
stage 1 on host b. The hosts are network namespaces on one machine, joined by a wire in user space (`tests/wire`); on a machine with a GPU both stages share it, and what they tell each other crosses the wire all the same.
`--dead-after` is 3 s. The wall clock of daemons and keepers is set by Debian's libfaketime (a kernel has one for all); their monotonic clock is left alone.

*start*: both ranks are up and have imported vLLM, and are about to take their devices and to meet each other. *loading*: they are about to load their weights. *request*: in the middle of a long streamed answer. *idle*: nobody asks.
What nobody notices (loss, delay, a full disk, …) is there from *loading* until the engine is ready, so that it has no *start* of its own; before it is ready an engine that gets SIGTERM has no orderly end, and is one that is killed.
All times from the fault, median and maximum of n repeats: *client*: until the client's
pending request fails; *health*: until `/health` is not 200; *ended*: until `vllm serve` has ended; *reaped*: until the group's keepers and workers are gone; *gone*: until the last process of the engine is gone on both hosts, vLLM's own with it (what is stopped or cut off ends once that is over).
*back*: from the end of the fault until both nodes are alive and hold nothing, or until the next request is answered (in a start: until both nodes are alive). After each it was checked that nothing is left: no process, no name in /dev/shm, no socket, nothing held, and no GPU memory (NVML, by process).

"""


def text(runs: list[dict[str, Any]]) -> str:
    """The page. A run has a machine, a date, a note and cells."""
    letters = "ABCDEFGH"
    out = [HEAD]
    for letter, run in zip(letters, runs, strict=False):
        repeats = sum(cell["played"] for cell in run["cells"])
        note = f" {run['note']}" if run["note"] else ""
        out.append(
            f"**{letter}**: {run['machine']}, {run['date']}: {len(run['cells'])} cells, {repeats} repeats.{note}\n\n"
        )
    order = {name: index for index, name in enumerate(BY_NAME)}
    rows = [(letter, cell) for letter, run in zip(letters, runs, strict=False) for cell in run["cells"]]
    rows.sort(key=lambda row: (order[row[1]["fault"]], MOMENTS.index(row[1]["moment"]), row[0]))
    out += [*_ends(rows), *_lives(rows), *_late(rows), *_said(rows), *_wrong(rows)]
    return "".join(out)


Rows = list[tuple[str, dict[str, Any]]]


def _ends(rows: Rows) -> Iterator[str]:
    yield "## What ends an engine\n\n| fault | moment | run | n | client | health | ended | reaped | gone | back | who notices |\n"
    yield "|---|---|---|---|---|---|---|---|---|---|---|\n"
    for letter, cell in rows:
        fault = BY_NAME[cell["fault"]]
        if fault.leads_to == "ends":
            names = ("told_ms", "unhealthy_ms", "ended_ms", "reaped_ms", "gone_ms", "back_ms")
            times = (span(cell[name]) for name in names)
            yield _row(fault.text, cell["moment"], letter, str(cell["played"]), *times, fault.who)


def _lives(rows: Rows) -> Iterator[str]:
    yield "\n## What an engine outlives\n\nNot one request failed, unless the last section says so. *slowest*: the slowest answer of four tokens.\n\n"
    yield "| fault | moment | run | n | lasted | answered | slowest | ready | back | who notices |\n|---|---|---|---|---|---|---|---|---|---|\n"
    for letter, cell in rows:
        fault = BY_NAME[cell["fault"]]
        if fault.leads_to == "lives":
            times = (span(cell[name]) for name in ("slowest_ms", "ready_ms", "back_ms"))
            lasted = (
                "the rest of the start"
                if fault.who == "nobody" and cell["moment"] in BEFORE_READY
                else f"{fault.lasts:g} s"
            )
            answered = str(cell["answered"] or "-")
            yield _row(fault.text, cell["moment"], letter, str(cell["played"]), lasted, answered, *times, fault.who)


def _late(rows: Rows) -> Iterator[str]:
    yield "\n## Later than wanted\n\nWanted: a killed worker at the client within 50 ms (on its host), 100 ms (from the other), with what vLLM's own processes take on the way; a cut or silence within 3.5 s; the group reaped 5 s after that (where its end was not noted by itself, the engine gone).\n\n"
    nothing = True
    for letter, cell in rows:
        fault = BY_NAME[cell["fault"]]
        known = KNOWN_WITHIN_MS.get(fault.name, 3500 if fault.line == SILENT else None)
        reaped = cell["reaped_ms"] or cell["gone_ms"]
        wanted = {"client": (cell["told_ms"], known), "reaped": (reaped, 5000 + (known or 0))}
        for what, (times, limit) in wanted.items() if fault.leads_to == "ends" else ():
            # What is stopped or cut off cannot end before that is over.
            if limit is None or (what == "reaped" and fault.stays):
                continue
            if late := [time for time in times if time > limit]:
                nothing = False
                yield f"- {fault.text}, {cell['moment']}, run {letter}: *{what}* {len(late)} of {len(times)} times, {span(times)}\n"
    if nothing:
        yield "Nothing.\n"


def _said(rows: Rows) -> Iterator[str]:
    yield "\n## The lines\n\nNumbers are shown as `N`. *client*: the error of the pending request. *status*: the cause of the group in `rayless status`. *log*: what the server's log says first.\n\n"
    said: dict[str, list[str]] = {}
    for _, cell in rows:
        words = [
            f"{who} {' / '.join(f'`{line}`' for line in (cell[name] if name == 'health' else _lines(cell[name])))}"
            for who, name in (("client", "errors"), ("health", "health"), ("status", "causes"), ("log", "lines"))
            if cell[name]
        ]
        fault = BY_NAME[cell["fault"]]
        if words and fault.leads_to == "ends":
            where = said.setdefault(f"{fault.text}: {'; '.join(words)}", [])
            where += [cell["moment"]] if cell["moment"] not in where else []
    for line, moments in said.items():
        yield f"- ({', '.join(moments)}) {line}\n"


def _wrong(rows: Rows) -> Iterator[str]:
    yield "\n## What was not as it must be\n\n"
    nothing = True
    for letter, cell in rows:
        for what, times in Counter([*cell["problems"], *(f"left: {left}" for left in cell["left"])]).items():
            nothing = False
            often = f" ({times} times)" if times > 1 else ""
            yield f"- {BY_NAME[cell['fault']].text}, {cell['moment']}, run {letter}: {what}{often}\n"
    if nothing:
        yield "Nothing.\n"


def _row(*words: str) -> str:
    return f"| {' | '.join(words)} |\n"


def _lines(lines: list[str]) -> list[str]:
    return sorted({re.sub(r"\d+(\.\d+)?", "N", line) for line in lines})
