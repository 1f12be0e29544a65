"""Engine cells on several stages at once. A lane is a process with hosts, wire, daemons and engine of its own, and with a /dev/shm of its own: what is
left there is left by its own engine."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from engine_cells import EngineCell, play
from engine_faults import BY_NAME, EngineFault
from engine_stage import BEFORE_READY, EngineStage, own_shared_memory
from stage import saturation

#: What a start is taken to last until one was seen, and what the rest of a cell takes beside the fault's own time; in seconds.
FIRST_START, REST = 60.0, 20.0
#: What a lane may take to end its engine and its hosts.
CLOSING = 90.0


@dataclass(frozen=True)
class Job:
    """One repeat of a cell."""

    fault: str
    moment: str
    repeat: int = 0
    #: How many lanes play it at the same time and share its fault.
    sharers: int = 1
    #: Only gets an engine up, for what is played next.
    prepares: bool = False

    @property
    def what(self) -> EngineFault:
        """Its fault."""
        return BY_NAME[self.fault]

    def suits(self, engine_runs: bool) -> int:
        """How well it follows: 0 uses an engine that runs or leaves one, 1 ends one, 2 throws a running one away."""
        if self.moment in BEFORE_READY and engine_runs:
            return 2
        return 0 if self.what.leads_to == "lives" else 1

    def takes(self, engine_runs: bool, start: float) -> float:
        """About how many seconds."""
        new = self.moment in BEFORE_READY or not engine_runs
        return (start if new else 0.0) + REST + (self.what.lasts if self.what.leads_to == "lives" else 0.0)


@dataclass
class Played:
    """What a lane answers."""

    cell: EngineCell
    seconds: float
    #: Whether its engine is there for the next one.
    engine_runs: bool
    #: Seconds of each start of an engine since the last answer.
    starts: list[float] = field(default_factory=list)


@dataclass
class Lane:
    """As the one who shares out sees it."""

    number: int
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    engine_runs: bool = False
    job: Job | None = None


class Lanes:
    """Shares jobs out over lanes. `done` gets what was seen of each, `until` is the time on the monotonic clock by which all has to be over."""

    def __init__(
        self, count: int, logs: Path, done: Callable[[Lane, Played], None], until: float | None = None
    ) -> None:
        self._logs = logs
        self._done = done
        self._until = until
        self._start = FIRST_START
        self._seen_start = False
        self.not_played: list[Job] = []
        self._lanes = [self._new(number) for number in range(count)]

    def play(self, jobs: Sequence[Job]) -> None:
        """Plays them, those that need the machine to themselves last: the repeats of such a cell share their fault, in as many lanes as there are."""
        self._play([job for job in jobs if not job.what.alone])
        alone = [job for job in jobs if job.what.alone]
        while alone:
            name = (alone[0].fault, alone[0].moment)
            together = [job for job in alone if (job.fault, job.moment) == name][: len(self._lanes)]
            alone = [job for job in alone if job not in together]
            self._play([replace(job, prepares=True) for job in together])
            self._play([replace(job, sharers=len(together)) for job in together])

    def _play(self, jobs: Sequence[Job]) -> None:
        todo = list(jobs)
        while True:
            for lane in self._lanes:
                if lane.job is None and (job := self._next(todo, lane)):
                    todo.remove(job)
                    lane.job = job
                    lane.pipe.send(job)
            busy = {lane.pipe: lane for lane in self._lanes if lane.job}
            if not busy:
                break
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                self._answered(busy[pipe])
        self.not_played += [job for job in todo if not job.prepares]

    def _next(self, todo: list[Job], lane: Lane) -> Job | None:
        """The job that suits the lane: none of those that throw an engine away while there are others, early repeats first, the longest first."""
        if self._until is not None:
            left = self._until - time.monotonic() - REST
            todo = [job for job in todo if job.takes(lane.engine_runs, self._start) < left]

        def order(job: Job) -> tuple[bool, int, int, float]:
            suits = job.suits(lane.engine_runs)
            return suits == 2, job.repeat, suits, -job.takes(lane.engine_runs, self._start)

        return min(todo, key=order, default=None)

    def _answered(self, lane: Lane) -> None:
        job = lane.job
        assert job
        try:
            played: Played = lane.pipe.recv()
        except EOFError:  # the lane ended: another takes its place
            cell = EngineCell(job.fault, job.moment, played=1)
            cell.problems.append("the lane ended without an answer")
            played = Played(cell, 0.0, False)
            lane.process.join(CLOSING)
            self._lanes[self._lanes.index(lane)] = self._new(lane.number)
        lane.job, lane.engine_runs = None, played.engine_runs
        for start in played.starts:
            self._start = max(self._start, start) if self._seen_start else start
            self._seen_start = True
        if played.cell.played:
            self._done(lane, played)

    def _new(self, number: int) -> Lane:
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        process = context.Process(target=_lane, args=(theirs, number, self._logs), name=f"lane {number}")
        process.start()
        theirs.close()
        return Lane(number, process, mine)

    def close(self) -> None:
        """Ends engines and hosts of all lanes."""
        for lane in self._lanes:
            with contextlib.suppress(OSError):
                lane.pipe.close()  # which ends the lane
        deadline = time.monotonic() + CLOSING
        for lane in self._lanes:
            lane.process.join(max(0.0, deadline - time.monotonic()))
            if lane.process.is_alive():
                lane.process.terminate()
                lane.process.join(CLOSING)


def _lane(pipe: Connection, number: int, logs: Path) -> None:
    """A lane: plays what it is told until the pipe closes."""
    own_shared_memory()
    stage: EngineStage | None = None
    known_starts = 0
    try:
        while True:
            job: Job = pipe.recv()
            cell, begin = EngineCell(job.fault, job.moment), time.monotonic()
            try:
                if stage is None:
                    stage, known_starts = EngineStage(seed=number + 1), 0
                if job.prepares:
                    stage.engine()
                else:
                    saturation.sharers = job.sharers
                    play(stage, job.what, job.moment, cell)
            except Exception as error:  # the lane goes on with a new stage
                cell.problems.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            starts = stage.ready_in[known_starts:] if stage else []
            known_starts += len(starts)
            if stage and (cell.problems or cell.left):
                stage.keep_logs(logs / f"engine-{cell.name}-{number}")
                stage.close()
                stage = None
            runs = stage is not None and stage.server is not None
            pipe.send(Played(cell, time.monotonic() - begin, runs, starts))
    except (EOFError, BrokenPipeError):
        pass
    finally:
        if stage:
            stage.close()
