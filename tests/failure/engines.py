"""Plays the engine cells of the failure matrix, with real vLLM, and writes down what was measured.

    python tests/failure/engines.py                       all of it, three times, into docs/failure-matrix-engines.json and .md
    python tests/failure/engines.py --lanes 8 --until 540 eight stages at once; nothing is begun that would not be over after 540 s
    python tests/failure/engines.py --resume              what an earlier go on this machine has not played
    python tests/failure/engines.py --only cut --repeats 1 --out DIR
    python tests/failure/engines.py --merge FILE          adds what was measured elsewhere

A cell is a fault at a moment of an engine's life: both ranks up and about to meet, about to load weights, in the middle of a long streamed answer,
idle. Cells that the engine outlives share it. Times are recorded, not judged; what does not come within the patience is a problem. Runs on the
CPU build of vLLM, or on a GPU: by the vLLM that is installed. Faults that the whole machine has (every core saturated) are played last, nothing beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from engine_cells import cells, summary
from engine_lanes import Job, Lane, Lanes, Played
from engine_record import Record, this_machine
from engine_stage import CLOCK_LIBRARY

RESULTS = Path("docs", "failure-matrix-engines.json")


def main() -> int:
    options = argparse.ArgumentParser(description="Plays the engine cells of the failure matrix.")
    options.add_argument("--only", default="", help="cells whose name (fault-moment) contains one of these (by commas)")
    options.add_argument("--skip", default="", help="but none whose name contains one of these (by commas)")
    options.add_argument("--repeats", type=int, default=3, help="of each cell")
    options.add_argument("--lanes", type=int, default=1, help="stages at once, each with an engine of its own")
    options.add_argument("--until", type=float, help="seconds after which all must be over")
    options.add_argument("--resume", action="store_true", help="keep what this machine has played already")
    options.add_argument("--out", type=Path, default=RESULTS.parent, help="folder of the .json and the .md")
    options.add_argument("--note", default="", help="a sentence on the page: what else ran on the machine")
    options.add_argument("--logs", type=Path, default=Path("target", "failure-logs"), help="where logs of problems go")
    options.add_argument("--merge", type=Path, action="append", help="play nothing, add the results in this file")
    given = options.parse_args()
    file = given.out / RESULTS.name
    record = Record.read(file)
    if given.merge:
        for other in given.merge:
            record.merge(Record.read(other))
        record.write(file)
        return 0
    return _play(given, record, file)


def _play(given: argparse.Namespace, record: Record, file: Path) -> int:
    until = None if given.until is None else time.monotonic() + given.until
    skipped = {f"{fault.name}-{moment}" for fault, moment in cells(given.skip)} if given.skip else set()
    if not CLOCK_LIBRARY.exists():
        print(f"no {CLOCK_LIBRARY}: clocks are left alone\nhint: apt-get install faketime", file=sys.stderr)
        skipped |= {f"{fault.name}-{moment}" for fault, moment in cells("clock")}
    wanted = [(fault, moment) for fault, moment in cells(given.only) if f"{fault.name}-{moment}" not in skipped]
    run = record.run(this_machine())
    run.note = given.note or run.note
    if not given.resume:
        run.forget({f"{fault.name}-{moment}" for fault, moment in wanted})
    jobs = []
    for fault, moment in wanted:
        known = run.cells.get(f"{fault.name}-{moment}")
        jobs += [Job(fault.name, moment, repeat) for repeat in range(known.played if known else 0, given.repeats)]
    wrong = 0

    def done(lane: Lane, played: Played) -> None:
        nonlocal wrong
        wrong += bool(played.cell.problems or played.cell.left)
        run.add(played.cell)
        record.write(file)
        print(f"{lane.number}:", summary(played.cell), f"({played.seconds:.0f} s)", flush=True)

    lanes = Lanes(min(given.lanes, max(1, len(jobs))), given.logs, done, until)
    try:
        lanes.play(jobs)
    finally:
        lanes.close()
    if lanes.not_played:
        print(f"{len(lanes.not_played)} of {len(jobs)} repeats were not begun: no time left", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(main())
