"""An hour (MINUTES) with every core saturated: is any node, keeper or worker taken for dead that is not?

    python tests/failure/saturated.py               one hour, into docs/saturated.json and .md; feeds the matrix its `busy` cells
    MINUTES=5 python tests/failure/saturated.py --out DIR

Eight busy loops a core run from before the first daemon starts until after the last cell, at the priority of the daemons and the workers. Beside them several
clusters of two hosts each: some play the `busy` cells of the failure matrix (idle, a start, calls, MINUTES/6 each, one after the other), some call one group
for all of the time, whose ranks exchange tensors over links between the hosts after every tenth call. The heads are asked for their state again and again, with a
second between: a suspect is an event of theirs and none is missed; the longest silence of a node is the longest that was seen at such a moment.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from faults import FAULTS, MOMENTS
from ground_faults import nothing
from lanes import Job, Lanes
from matrix import RESULTS, Cell, write
from stage import Stage, saturation

#: Events that would be a false alarm (the first is none that ends anything).
ALARMS = ("node-suspect", "node-dead", "node-fenced", "group-failed")
STEADY = "busy-steady"
BUSY = next(fault for fault in FAULTS if fault.name == "busy")


class Heads(threading.Thread):
    """Asks every head again and again what it thinks of its nodes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._stages: dict[int, Stage] = {}
        #: Events already counted, by lane: each has its time, its kind and its line.
        self._known: dict[int, set[tuple[Any, ...]]] = {}
        self.alarms: list[str] = []
        self.kinds = Counter[str]()
        self.asked = 0
        self.not_answered = 0
        self.slowest_answer_ms = 0.0
        self.silence_ms: dict[int, int] = {}
        self.start()

    def add(self, lane: int, stage: Stage) -> None:
        stage.wire.ahead()
        with self._lock:
            self._stages[lane] = stage

    def run(self) -> None:
        while not self._over.wait(1):
            with self._lock:
                stages = dict(self._stages)
            for lane, stage in stages.items():
                self._ask(lane, stage)

    def _ask(self, lane: int, stage: Stage) -> None:
        begin = time.monotonic()
        try:
            # From outside of the host: what runs inside it is taken for something that a group left.
            asked = [stage.cluster.rayless, "status", "--json", "--run-dir", str(stage.cluster.run_dir(0))]
            shown = subprocess.run(asked, capture_output=True, timeout=60, check=True)
            status = json.loads(shown.stdout)
        except (subprocess.SubprocessError, OSError):
            self.not_answered += not self._over.is_set() and stage.cluster.base.exists()
            return
        self.asked += 1
        self.slowest_answer_ms = max(self.slowest_answer_ms, 1000 * (time.monotonic() - begin))
        for node in status["nodes"]:
            self.silence_ms[lane] = max(self.silence_ms.get(lane, 0), node["last_seen_ms"])
        known = self._known.setdefault(lane, set())
        for event in status["events"]:
            mark = tuple(sorted((key, str(value)) for key, value in event.items()))
            if mark not in known:
                known.add(mark)
                self.kinds[event["kind"]] += 1
                if event["kind"] in ALARMS:
                    self.alarms.append(f"lane {lane}: {event['kind']}: {event.get('text') or event}")

    def end(self) -> None:
        self._over.set()
        self.join()


def cells(lane: int, each: float) -> Callable[[], Job | None]:
    """Six cells of `each` seconds, from another moment on in each lane, so that at any time there is one of every kind."""
    moments = itertools.islice(itertools.cycle(MOMENTS), lane % 3, lane % 3 + 6)
    fault = replace(BUSY, inject=nothing, undo=nothing, lasts=each)
    return lambda: next((Job(fault, moment) for moment in moments), None)


def steady(seconds: float) -> Callable[[], Job | None]:
    """One group that is called for all of the time."""
    jobs = iter([Job(replace(BUSY, name=STEADY, inject=nothing, undo=nothing, lasts=seconds), "call")])
    return lambda: next(jobs, None)


def page(record: dict[str, Any]) -> str:
    """For people."""
    steadily = record["steady"]
    cells = record["cells"]
    heads = record["heads"]

    def most(name: str, of: list[dict[str, Any]]) -> str:
        times = sorted(time for cell in of for time in cell[name])
        return f"{times[len(times) // 2]:.0f} / {times[-1]:.0f} ms" if times else "-"

    calls, exchanged = (sum(cell[name] for cell in [*cells, *steadily]) for name in ("calls", "exchanged"))
    lines = [
        "# An hour with all cores saturated" if record["minutes"] >= 60 else "# All cores saturated",
        "",
        f"Made by `tests/run saturated` ({record['date']}, {record['minutes']:g} minutes, {record['cores']} cores, {record['loops']} busy loops, "
        f"{record['clusters']} clusters of two hosts at once, commit {record['commit']}); do not edit. {(__doc__ or '').split(chr(10) * 2)[2].strip()}",
        "",
        *([record["note"], ""] if record["note"] else []),
        f"**{heads['kinds'].get('node-dead', 0)} deaths, {heads['kinds'].get('node-suspect', 0)} suspects, "
        f"{calls} calls to all four ranks, {exchanged} rounds of tensors.** `--dead-after` is 3 s; a node is suspect after 1.5 s.",
        "",
        "| what | value |",
        "|---|---|",
        f"| times a head was asked | {heads['asked']} (slowest answer {heads['slowest_answer_ms']:.0f} ms, process included; {heads['not_answered']} without an answer) |",
        f"| longest silence of a node seen | {max(heads['silence_ms'].values(), default=0)} ms |",
        f"| groups that lived through it all | {sum(len(c['back_ms']) for c in steadily)}: {sum(c['calls'] for c in steadily)} calls, slowest {most('slowest_ms', steadily)} (p50 / max over groups); "
        f"{sum(c['exchanged'] for c in steadily)} rounds of 4 tensors of {BUSY.tensor // 1024} KiB, slowest {most('exchange_ms', steadily)} |",
    ]
    for cell in cells:
        n = len(cell["back_ms"])
        words = f"n {n}; a call afterwards answered after {most('back_ms', [cell])}"
        if cell["calls"]:
            words += f"; {cell['calls']} calls, slowest {most('slowest_ms', [cell])}"
        if cell["start_ms"]:
            words += f"; start under load {most('start_ms', [cell])}"
        lines.append(f"| `busy` cells, {cell['moment']}, {record['cell_s'] / 60:g} minutes each | {words} |")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(heads["kinds"].items()))
    lines += ["", f"Events of the heads: {kinds or 'none'}.", "", "## Problems", ""]
    return "\n".join([*lines, *([f"- {one}" for one in record["problems"]] or ["None."]), ""])


def main() -> int:
    """Runs it; 1 where there was a problem."""
    options = argparse.ArgumentParser(description="Saturated cores, and nobody taken for dead.")
    options.add_argument("--minutes", type=float, default=float(os.environ.get("MINUTES", "60")))
    options.add_argument("--lanes", type=int, default=5, help="clusters that play cells, six each")
    options.add_argument("--steady", type=int, default=2, help="clusters with a group that lives through it all")
    options.add_argument("--out", type=Path, default=RESULTS.parent, help="folder of saturated.json and .md")
    options.add_argument("--note", default="", help="a sentence on the page: the machine, what else ran on it")
    options.add_argument("--logs", type=Path, default=Path("target", "failure-logs", "saturated"))
    given = options.parse_args()
    each = 10 * given.minutes
    heads = Heads()
    lanes = Lanes(given.logs)
    saturation.begin()
    begin = time.monotonic()
    try:
        jobs = [cells(lane, each) for lane in range(given.lanes)]
        lanes.run([*jobs, *(steady(60 * given.minutes) for _ in range(given.steady))], heads.add)
    finally:
        heads.end()
        saturation.end()
    took = time.monotonic() - begin
    played = [cell for cell in lanes.cells.values() if cell.fault == BUSY.name]
    problems = [*lanes.problems, *heads.alarms]
    problems += [f"{cell.name}: {what}" for cell in lanes.cells.values() for what in [*cell.problems, *cell.left]]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
        "minutes": round(took / 60, 1),
        "cell_s": each,
        "cores": os.cpu_count(),
        "loops": 8 * (os.cpu_count() or 1),
        "clusters": given.lanes + given.steady,
        "note": given.note,
        "heads": {
            "asked": heads.asked,
            "not_answered": heads.not_answered,
            "slowest_answer_ms": heads.slowest_answer_ms,
            "silence_ms": heads.silence_ms,
            "kinds": dict(heads.kinds),
        },
        "cells": [asdict(cell) for cell in played],
        "steady": [asdict(cell) for cell in lanes.cells.values() if cell.fault == STEADY],
        "problems": problems,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "saturated.json").write_text(json.dumps(record, indent=1) + "\n")
    (given.out / "saturated.md").write_text(page(record))
    if each >= BUSY.lasts:
        feed(given.out / RESULTS.name, played)
    for one in problems:
        print(f"PROBLEM {one}", file=sys.stderr)
    return 1 if problems else 0


def feed(matrix: Path, played: list[Cell]) -> None:
    """Puts the cells into the matrix's own record, in place of what it had."""
    old: dict[str, Any] = json.loads(matrix.read_text()) if matrix.exists() else {"cells": [], "note": ""}
    found = {cell.name: cell for cell in (*(Cell(**one) for one in old["cells"]), *played)}
    write(matrix, list(found.values()), old["note"])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(main())
