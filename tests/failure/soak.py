"""A real engine under load for MINUTES (60), with a kill every minute: is every request accounted for, and does anything grow?

    python tests/failure/soak.py                    one hour, into docs/soak.json and docs/soak.md
    MINUTES=5 python tests/failure/soak.py --out DIR

Each turn an engine in two stages answers four clients, then something is killed: a rank, a keeper, EngineCore, the API server, or the other host's daemon. What
the kill ends is started again. A request is answered, or fails with the client's own words for it; one that does neither is a problem, and so is one that fails
where nothing of its engine was killed. Meanwhile memory, descriptors and threads of every rayless process are looked at; the head, which nobody kills, lives
through it all and must be as large at the end as after its first turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine_stage import EngineStage
from stage import HANG, Hang

from serving import Server

CLIENTS = 4
KILL = 9
#: Killed in turn; all but the last end the engine.
VICTIMS = ("worker@b", "keeper@b", "EngineCore", "worker@a", "keeper@a", "api server", "daemon@b")
#: Seconds between two looks at the processes.
PERIOD = 5.0
#: What a process may gain from its first looks to its last.
MEMORY_KB, FDS, THREADS = 2048, 2, 1


@dataclass
class Turn:
    """One minute."""

    number: int
    victim: str
    #: Seconds from the start of the engine until it was ready; 0 where it still ran.
    ready_s: float = 0.0
    answered: int = 0
    #: The clients' words for what failed, and how often.
    failed: dict[str, int] = field(default_factory=dict)
    #: Made, and neither answered nor failed in time.
    lost: int = 0
    #: From the kill until the last client knew, in milliseconds; 0 where nobody had to.
    told_ms: float = 0.0
    #: From the kill until the last process of the engine was gone.
    gone_ms: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Size:
    """One look at a process."""

    memory_kb: int
    fds: int
    threads: int


class Client(threading.Thread):
    """Asks one question after the other and keeps account of each."""

    def __init__(self, server: Server, tokens: int) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._tokens = tokens
        self._over = threading.Event()
        self.made = self.answered = 0
        self.failed: Counter[str] = Counter()
        self.failed_at = 0.0
        self.start()

    def run(self) -> None:
        with self._server.client() as client:
            while not self._over.is_set():
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
                    self.failed[f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"] += 1
                    return
                self.answered += 1

    def end(self) -> None:
        """After the request that is under way."""
        self._over.set()


class Sampler(threading.Thread):
    """Looks at the processes of a stage again and again."""

    def __init__(self, stage: EngineStage) -> None:
        super().__init__(daemon=True)
        self._stage = stage
        self._over = threading.Event()
        #: By name and pid, each with the seconds since the start.
        self.seen: dict[str, list[tuple[float, Size]]] = {}
        self._begin = time.monotonic()
        self.start()

    def run(self) -> None:
        while not self._over.wait(PERIOD):
            for name, pid in self._processes():
                with contextlib.suppress(OSError, ValueError, IndexError):
                    self.seen.setdefault(f"{name} {pid}", []).append((time.monotonic() - self._begin, size(pid)))

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
    """Of a process, now. Raises `OSError` where it is gone."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    memory = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return Size(memory, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))


def play(stage: EngineStage, turn: Turn, until: float) -> None:
    """One turn, which kills at `until` on the monotonic clock. Raises `Hang`."""
    fresh = stage.server is None
    server = stage.engine()
    turn.ready_s = stage.ready_in[-1] if fresh else 0.0
    clients = [Client(server, 4 + 20 * index) for index in range(CLIENTS)]
    time.sleep(max(5.0, until - time.monotonic()))
    early = [words for client in clients for words in client.failed]
    turn.problems += [f"failed before anything was killed: {words}" for words in early]
    if turn.victim == "daemon@b":
        with contextlib.closing(stage.daemon("b")) as daemon:
            daemon.signal(KILL)
            daemon.gone(5)
        time.sleep(3)
        stage.restart_daemon("b")
        stage.wait_alive(0)
        for client in clients:
            client.end()
        _account(turn, clients, time.monotonic())
        turn.problems += [f"the engine does not need that daemon, but: {words}" for words in turn.failed]
        return
    at = stage.process(turn.victim).signal(KILL)
    _account(turn, clients, at)
    turn.told_ms = 1000 * max(client.failed_at - at for client in clients)
    gone, left = stage.gone(at)
    turn.problems += [f"still there after {HANG:.0f} s: {what}" for what in left]
    turn.gone_ms = 1000 * (gone or 0.0)
    stage.end_engine()
    stage.wait_alive(0)
    deadline = time.monotonic() + HANG
    while (leftovers := stage.leftovers()) and time.monotonic() < deadline:
        time.sleep(0.05)
    turn.problems += [f"left behind: {what}" for what in leftovers]


def _account(turn: Turn, clients: list[Client], since: float) -> None:
    for client in clients:
        client.join(max(0.0, since + HANG - time.monotonic()))
        turn.answered += client.answered
        turn.lost += client.made - client.answered - client.failed.total()
        for words, count in client.failed.items():
            turn.failed[words] = turn.failed.get(words, 0) + count
    if turn.lost:
        turn.problems.append(f"{turn.lost} requests were neither answered nor refused")


def growth(seen: dict[str, list[tuple[float, Size]]], least: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Of every process that was seen for `least` seconds: medians of its first and last looks; and which of them grew."""
    rows, problems = [], []
    for name, looks in sorted(seen.items()):
        if len(looks) < 12 or looks[-1][0] - looks[0][0] < least:
            continue
        # The first looks of a life are its growing up.
        settled = [one for _, one in looks[3:]]
        third = max(1, len(settled) // 3)
        row: dict[str, Any] = {"process": name, "seconds": round(looks[-1][0] - looks[0][0]), "looks": len(looks)}
        for what, may in (("memory_kb", MEMORY_KB), ("fds", FDS), ("threads", THREADS)):
            first, last = (
                statistics.median(getattr(one, what) for one in part) for part in (settled[:third], settled[-third:])
            )
            row[what] = [first, last, max(getattr(one, what) for one in settled)]
            if last - first > may and not name.startswith(("worker", "EngineCore")):
                problems.append(f"{name}: {what} went from {first:g} to {last:g}")
        rows.append(row)
    return rows, problems


def page(record: dict[str, Any]) -> str:
    """For people."""
    turns = record["turns"]
    answered, failed = sum(t["answered"] for t in turns), sum(sum(t["failed"].values()) for t in turns)
    lost = sum(t["lost"] for t in turns)
    lines = [
        "# Soak",
        "",
        f"Made by `tests/run soak` ({record['date']}, {record['minutes']:g} minutes); do not edit. {__doc__.split(chr(10) * 2)[2].strip()}",
        "",
        record["note"],
        "",
        f"**{answered + failed + lost} requests: {answered} answered, {failed} failed with an error, {lost} lost.** {len(turns)} kills.",
        "",
        "| killed | turns | requests answered | failed | told, p50 / max | engine gone, p50 / max |",
        "|---|---|---|---|---|---|",
    ]
    for victim in VICTIMS:
        of = [turn for turn in turns if turn["victim"] == victim]
        if not of:
            continue
        told, gone = sorted(t["told_ms"] for t in of), sorted(t["gone_ms"] for t in of)
        times = " | ".join(f"{one[len(one) // 2]:.0f} / {one[-1]:.0f} ms" if one[-1] else "-" for one in (told, gone))
        counts = f"{sum(t['answered'] for t in of)} | {sum(sum(t['failed'].values()) for t in of)}"
        lines.append(f"| {victim} | {len(of)} | {counts} | {times} |")
    words = Counter[str]()
    for turn in turns:
        words.update(turn["failed"])
    lines += [
        "",
        "What the clients were told:",
        "",
        *(f"- {count} times `{text}`" for text, count in words.most_common()),
    ]
    lines += [
        "",
        "| process (pid) | seen for | memory, first / last / most, KB | descriptors | threads |",
        "|---|---|---|---|---|",
    ]
    for row in record["processes"]:
        cells = " | ".join(" / ".join(f"{n:g}" for n in row[what]) for what in ("memory_kb", "fds", "threads"))
        lines.append(f"| {row['process']} | {row['seconds']} s | {cells} |")
    lines += ["", "## Problems", "", *([f"- {one}" for one in record["problems"]] or ["None."]), ""]
    return "\n".join(lines)


def main() -> int:
    """Runs it; 1 where there was a problem."""
    options = argparse.ArgumentParser(description="An engine under load, with a kill every minute.")
    options.add_argument("--minutes", type=float, default=float(os.environ.get("MINUTES", "60")))
    options.add_argument("--out", type=Path, default=Path("docs"), help="folder of soak.json and soak.md")
    options.add_argument("--note", default="", help="a sentence on the page: the machine, what else ran on it")
    options.add_argument("--logs", type=Path, default=Path("target", "failure-logs", "soak"))
    given = options.parse_args()
    end = time.monotonic() + 60 * given.minutes
    stage = EngineStage()
    sampler = Sampler(stage)
    turns: list[Turn] = []
    problems: list[str] = []
    try:
        while time.monotonic() < end:
            turn = Turn(len(turns) + 1, VICTIMS[len(turns) % len(VICTIMS)])
            turns.append(turn)
            try:
                play(stage, turn, time.monotonic() + 60)
            except (Hang, RuntimeError, TimeoutError, OSError) as error:
                turn.problems.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
                stage.end_engine()
            problems += [f"turn {turn.number} ({turn.victim}): {what}" for what in turn.problems]
            print(asdict(turn), flush=True)
            if turn.problems:
                stage.keep_logs(given.logs / f"turn-{turn.number}")
    finally:
        sampler.end()
        rows, grown = growth(sampler.seen, min(300.0, 20 * given.minutes))
        problems += grown
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "minutes": given.minutes,
            "note": given.note,
            "turns": [asdict(turn) for turn in turns],
            "processes": rows,
            "problems": problems,
        }
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "soak.json").write_text(json.dumps(record, indent=1) + "\n")
        (given.out / "soak.md").write_text(page(record))
        stage.close()
    for one in problems:
        print(f"PROBLEM {one}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(main())
