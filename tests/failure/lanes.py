"""Cells of the matrix played on several stages at once, for those in which it is seconds that pass."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import Fault
from matrix import Cell, play, summary
from stage import Hang, Stage


@dataclass(frozen=True)
class Job:
    """One repeat of a cell."""

    fault: Fault
    moment: str


class Lanes:
    """As many threads as there are lists of jobs, each with a stage of its own (hosts, wire, daemons and driver)."""

    def __init__(self, logs: Path, done: Callable[[Cell], None] | None = None) -> None:
        self._logs = logs
        self._done = done
        self._lock = threading.Lock()
        #: Cell by name, of all repeats so far.
        self.cells: dict[str, Cell] = {}
        #: What went wrong outside of any cell.
        self.problems: list[str] = []

    def play(self, lanes: int, jobs: Sequence[Job]) -> None:
        """Plays the jobs in as many lanes; a lane that is free takes the next one."""
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        self.run([lambda: self._next(waiting)] * min(lanes, len(jobs)))

    def run(
        self,
        lanes: Sequence[Callable[[], Job | None]],
        watched: Callable[[int, Stage], None] = lambda lane, stage: None,
    ) -> None:
        """Runs lanes, each of which is asked for its next job until it has none. `watched` is told of each new stage."""
        threads = [
            threading.Thread(target=self._lane, args=(index, take, watched), name=f"lane {index}")
            for index, take in enumerate(lanes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    @staticmethod
    def _next(waiting: queue.SimpleQueue[Job]) -> Job | None:
        try:
            return waiting.get_nowait()
        except queue.Empty:
            return None

    def _lane(self, lane: int, take: Callable[[], Job | None], watched: Callable[[int, Stage], None]) -> None:
        stage: Stage | None = None
        try:
            while job := take():
                if stage is None:
                    stage = Stage(seed=lane + 1)
                    watched(lane, stage)
                if self._play(lane, stage, job):
                    stage.close()
                    stage = None
        except Exception as error:  # the other lanes play on, and this is reported at the end
            with self._lock:
                self.problems.append(f"lane {lane}: {type(error).__name__}: {error}")
        finally:
            if stage:
                stage.close()

    def _play(self, lane: int, stage: Stage, job: Job) -> bool:
        """Plays a job; whether the stage is spoilt by it."""
        cell, begin = Cell(job.fault.name, job.moment), time.monotonic()
        try:
            play(stage, job.fault, job.moment, 1, cell)
        except Hang as hang:
            cell.problems.append(str(hang))
        if spoilt := bool(cell.problems or cell.left):
            stage.keep_logs(self._logs / f"{job.fault.name}-{job.moment}-lane{lane}")
        with self._lock:
            print(f"lane {lane}:", summary(cell), f"({time.monotonic() - begin:.0f} s)", flush=True)
            whole = self.cells.setdefault(cell.name, Cell(job.fault.name, job.moment))
            whole.add(cell)
            if self._done:
                self._done(whole)
        return spoilt
