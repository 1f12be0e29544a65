"""A real engine under load for MINUTES (60), with a kill every minute: is every request accounted for, and does anything grow?

    python tests/failure/soak.py                    one hour, into docs/soak.json and docs/soak.md
    MINUTES=5 python tests/failure/soak.py --out DIR

Two parts. In the first fifth one engine lives on while the head and the other host's node daemon are killed in turns, and started again: not one of its requests
may fail. In the rest each kill ends the engine (a rank, a keeper, EngineCore, the API server, the wire between the hosts), which is then started again, while
head and node daemon live through it all. Four clients ask all the time. A request is answered, or fails with the client's own words for it; one that does
neither is a problem, and so is one that fails where nothing of its engine was killed. Every few seconds that an engine is under load memory, descriptors and
threads of every process are looked at: what lives through a part must be as large in its last third as in its first, and the last of the short-lived ones as large as the first of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import soak_page
from engine_stage import EngineStage, own_shared_memory
from ground_faults import clear, to_daemon, wire
from soak_page import Size
from stage import HANG, Hang

from serving import Server

CLIENTS = 4
KILL = signal.SIGKILL
#: The engine outlives it.
LIVES = ("head", "daemon@b")
#: It ends the engine.
ENDS = ("worker@b", "keeper@b", "EngineCore", "wire", "worker@a", "keeper@a", "api server")
#: Seconds between two kills; where an engine takes long to start, it is under load at least that long.
EVERY, LEAST_LOAD = 60.0, 15.0
#: Seconds that an engine may take to start, twice: other runs may have the machine busy.
START = 900.0
#: Part of the time in which the engine lives on.
FIRST = 0.2
#: Seconds for which a killed daemon stays away: longer than the head takes to notice.
AWAY = 4.0
#: Seconds between two looks at the processes.
PERIOD = 3.0
#: What vLLM's front end, EngineCore or the client library say of a lost engine. A time-out is none.
CLEAR = ("InternalServerError: Error code: 500", "APIConnectionError: Connection error", "APIError: ")


@dataclass
class Turn:
    """From one kill to the next."""

    number: int
    victim: str
    #: Seconds from the start of the engine until it was ready; 0 where it still ran.
    ready_s: float = 0.0
    #: Seconds under load before the kill, and since the kill before; 0 for the first.
    load_s: float = 0.0
    since_last_s: float = 0.0
    answered: int = 0
    slowest_ms: float = 0.0
    #: The clients' words for what failed, and how often.
    failed: dict[str, int] = field(default_factory=dict)
    #: Made, and neither answered nor failed in time.
    lost: int = 0
    #: From the kill until the last request that was under way had failed, in milliseconds; 0 where none had to.
    told_ms: float = 0.0
    #: From the kill until the last process of the engine was gone; where it lives on, from the daemon's start until the cluster was whole.
    gone_ms: float = 0.0
    problems: list[str] = field(default_factory=list)


class Client(threading.Thread):
    """Asks one question after the other and keeps account of each."""

    def __init__(self, server: Server, tokens: int, think: float) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._tokens = tokens
        self._think = think
        self._over = threading.Event()
        self.made = self.answered = 0
        self.slowest = 0.0
        self.failed: Counter[str] = Counter()
        #: When the last request began, and when it failed.
        self.began = self.failed_at = 0.0
        self.start()

    def run(self) -> None:
        with self._server.client() as client:
            while not self._over.is_set():
                self.began = time.monotonic()
                self.made += 1
                try:
                    done = client.completions.create(
                        model=self._server.name,
                        prompt="What is a pipeline?",
                        max_tokens=self._tokens,
                        extra_body={"ignore_eos": True},
                    )
                    if done.usage.completion_tokens != self._tokens:
                        raise RuntimeError(f"an answer of {done.usage.completion_tokens} tokens")
                except Exception as error:  # every way in which a request can end has to be counted
                    self.failed_at = time.monotonic()
                    self.failed[f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"] += 1
                    return
                self.slowest = max(self.slowest, time.monotonic() - self.began)
                self.answered += 1
                self._over.wait(self._think)

    def end(self) -> None:
        """After the request that is under way."""
        self._over.set()


class Sampler(threading.Thread):
    """Looks at the processes of a stage again and again."""

    def __init__(self, stage: EngineStage) -> None:
        super().__init__(daemon=True)
        self._stage = stage
        self._over = threading.Event()
        #: Whether an engine is under load: what is compared has to be in the same state.
        self.loaded = False
        #: By name and pid, in order of their first look; each look with its time on the monotonic clock.
        self.seen: dict[tuple[str, int], list[tuple[float, Size]]] = {}
        self.start()

    def run(self) -> None:
        while not self._over.wait(PERIOD):
            looks = []
            for name, pid in self._processes() if self.loaded else ():
                with contextlib.suppress(OSError, ValueError, KeyError):
                    looks.append(((name, pid), (time.monotonic(), size(pid))))
            if self.loaded:  # still
                for process, look in looks:
                    self.seen.setdefault(process, []).append(look)

    def _processes(self) -> Iterator[tuple[str, int]]:
        for index, name in enumerate("ab"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                yield ("head" if name == "a" else "daemon@b"), self._stage.cluster.daemon_pid(index)
            for file in (self._stage.cluster.run_dir(index) / "keepers").glob("*.pid"):
                with contextlib.suppress(OSError, ValueError):
                    yield f"keeper@{name}", int(file.read_text())
        for process in list(self._stage.processes):
            if process.what.startswith("worker@") or process.what == "EngineCore":
                yield process.what, process.pid

    def end(self) -> None:
        self._over.set()
        self.join(2 * PERIOD)


def size(pid: int) -> Size:
    """Of a process, now. Raises `OSError` or `KeyError` where it is gone."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    own, all_of_it = (int(status[name].split()[0]) for name in ("RssAnon", "VmRSS"))
    return Size(own, all_of_it, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]))


class Soak:
    """The run: an engine and those who ask it, killed again and again."""

    def __init__(self, stage: EngineStage, sampler: Sampler, think: float) -> None:
        self.stage = stage
        self._sampler = sampler
        self._think = think
        self.turns: list[Turn] = []
        self._last_kill = 0.0

    def play(self, victim: str) -> Turn:
        """One turn; whatever goes wrong is in its problems."""
        turn = Turn(len(self.turns) + 1, victim)
        self.turns.append(turn)
        try:
            self._play(turn)
        except (Hang, RuntimeError, TimeoutError, OSError, StopIteration) as error:
            self._sampler.loaded = False
            turn.problems.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            clear(self.stage)
            self.stage.end_engine()
        return turn

    def _play(self, turn: Turn) -> None:
        starts = len(self.stage.ready_in) if self.turns[1:] else 0
        server = self.stage.engine()
        turn.ready_s = self.stage.ready_in[-1] if len(self.stage.ready_in) > starts else 0.0
        begin = time.monotonic()
        clients = [Client(server, 4 + 20 * index, self._think) for index in range(CLIENTS)]
        until = max(begin + LEAST_LOAD, self._last_kill + EVERY if self._last_kill else begin + EVERY)
        self._sampler.loaded = True
        time.sleep(until - begin)
        early = [words for client in clients for words in client.failed]
        turn.problems += [f"failed before anything was killed: {words}" for words in early]
        turn.load_s = time.monotonic() - begin
        self._sampler.loaded = False
        if turn.victim in LIVES:
            self._lives(turn, clients)
        else:
            self._ends(turn, clients)

    def _killed(self, turn: Turn, at: float) -> None:
        if self._last_kill:
            turn.since_last_s = at - self._last_kill
        self._last_kill = at

    def _lives(self, turn: Turn, clients: list[Client]) -> None:
        """The engine goes on without its daemon, and after its return."""
        stage = self.stage
        host = "a" if turn.victim == "head" else "b"
        self._killed(turn, to_daemon(host, KILL)(stage))
        time.sleep(AWAY)
        back = time.monotonic()
        stage.restart_daemon(host)
        stage.wait_alive(0)
        stage.until(lambda: stage.group_now()["state"] == "running", "the group is running again in the head's books")
        turn.gone_ms = 1000 * (time.monotonic() - back)
        answered = [client.answered for client in clients]
        # Two: the first of them may have begun before.
        stage.until(
            lambda: all(c.failed or c.answered >= n + 2 for c, n in zip(clients, answered, strict=True)),
            "every client is answered again",
        )
        for client in clients:
            client.end()
        self._account(turn, clients, time.monotonic())
        turn.problems += [f"the engine does not need that daemon, but: {words}" for words in turn.failed]

    def _ends(self, turn: Turn, clients: list[Client]) -> None:
        """The engine ends; all that it had goes."""
        stage = self.stage
        at = wire(cut=True)(stage) if turn.victim == "wire" else stage.process(turn.victim).signal(KILL)
        self._killed(turn, at)
        self._account(turn, clients, at)
        turn.told_ms = max([1000 * (client.failed_at - at) for client in clients if client.began <= at], default=0.0)
        turn.problems += [f"not a clear error: {words}" for words in turn.failed if not words.startswith(CLEAR)]
        gone, left = stage.gone(at)
        turn.problems += [f"still there after {HANG:.0f} s: {what}" for what in left]
        turn.gone_ms = 1000 * (gone or 0.0)
        clear(stage)
        stage.end_engine()
        stage.wait_alive(0)
        leftovers: list[str] = []

        def clean() -> bool:
            leftovers[:] = stage.leftovers()
            return not leftovers

        with contextlib.suppress(Hang):
            stage.until(clean, "nothing is left")
        turn.problems += [f"left behind: {what}" for what in leftovers]

    def _account(self, turn: Turn, clients: list[Client], since: float) -> None:
        for client in clients:
            client.join(max(0.0, since + HANG - time.monotonic()))
            turn.answered += client.answered
            turn.slowest_ms = max(turn.slowest_ms, 1000 * client.slowest)
            turn.lost += client.made - client.answered - client.failed.total()
            for words, count in client.failed.items():
                turn.failed[words] = turn.failed.get(words, 0) + count
        if turn.lost:
            turn.problems.append(f"{turn.lost} requests were neither answered nor refused")


def main() -> int:
    """Runs it; 1 where there was a problem."""
    options = argparse.ArgumentParser(description="An engine under load, with a kill every minute.")
    options.add_argument("--minutes", type=float, default=float(os.environ.get("MINUTES", "60")))
    options.add_argument("--out", type=Path, default=Path("docs"), help="folder of soak.json and soak.md")
    options.add_argument("--note", default="", help="a sentence on the page: the machine, what else ran on it")
    options.add_argument(
        "--think",
        type=float,
        default=0.2,
        help="seconds of a client between two requests; more leaves more of the machine to others",
    )
    options.add_argument(
        "--logs",
        type=Path,
        default=Path("target", "failure-logs", "soak"),
        help="where the logs of a turn with a problem go",
    )
    given = options.parse_args()
    own_shared_memory()
    stage = EngineStage(damage=False, start=START)
    sampler = Sampler(stage)
    soak = Soak(stage, sampler, given.think)
    problems: list[str] = []
    begin = changed = time.monotonic()
    try:
        stage.engine()
        # The time is that of an engine that is there.
        begin = changed = time.monotonic()
        change, end = begin + 60 * given.minutes * FIRST, begin + 60 * given.minutes
        while time.monotonic() < end:
            if time.monotonic() < change:
                victim = LIVES[len(soak.turns) % len(LIVES)]
            else:
                victim = ENDS[sum(turn.victim in ENDS for turn in soak.turns) % len(ENDS)]
            turn = soak.play(victim)
            if changed == begin and victim in ENDS:
                changed = time.monotonic()
            problems += [f"turn {turn.number} ({turn.victim}): {what}" for what in turn.problems]
            print(json.dumps(asdict(turn)), flush=True)
            if turn.problems:
                stage.keep_logs(given.logs / f"turn-{turn.number}")
    finally:
        sampler.end()
        rows, grown = soak_page.growth(sampler.seen, begin, changed, time.monotonic())
        kinds, fatter = soak_page.generations(sampler.seen)
        problems += grown + fatter
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "minutes": round((time.monotonic() - begin) / 60, 1),
            "note": given.note,
            "clients": CLIENTS,
            "think_s": given.think,
            "turns": [asdict(turn) for turn in soak.turns],
            "processes": rows,
            "kinds": kinds,
            "problems": problems,
        }
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "soak.json").write_text(json.dumps(record, indent=1) + "\n")
        (given.out / "soak.md").write_text(
            soak_page.page(record, (*LIVES, *ENDS), (__doc__ or "").split("\n\n")[2].strip())
        )
        stage.close()
    for one in problems:
        print(f"PROBLEM {one}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
