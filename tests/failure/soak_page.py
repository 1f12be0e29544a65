"""What a soak has found: which processes grew, and the page for people."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Looks at a process from its first to its last, each with its time in seconds.
Looks = Sequence[tuple[float, "Size"]]

#: How a measure is called on the page, and by how much it may differ between the first third and the last: of our own processes, of those in which vLLM runs
#: (its allocator's caches come and go).
MEASURES = {
    "own_kb": ("memory of its own, KB", 1024, 16384),
    "rss_kb": ("resident, KB", None, None),
    "fds": ("descriptors", 1, 2),
    "threads": ("threads", 0, 1),
}
#: Processes in which vLLM runs. From start to start they differ by more (38 MiB was seen) than one grows.
VLLMS = ("worker", "EngineCore")
START_KB = 65536
#: The first looks at a process are its growing up; of the processes that live for a minute at most, which are compared by their largest, all count.
YOUNG = 5
LEAST = 3
#: A process that lives through a part is one that was seen for this share of it.
THROUGH = 0.6


@dataclass(frozen=True)
class Size:
    """One look at a process."""

    #: Anonymous memory: what it has allocated. Unlike the rest it does not depend on who else maps the same files.
    own_kb: int
    rss_kb: int
    fds: int
    threads: int


def _limit(name: str, measure: str) -> int | None:
    _, ours, vllms = MEASURES[measure]
    return vllms if name.startswith(VLLMS) else ours


def _thirds(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and of the last third."""
    third = max(1, len(values) // 3)
    return statistics.median(values[:third]), statistics.median(values[-third:])


def growth(
    seen: Mapping[tuple[str, int], Looks], begin: float, change: float, end: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Of every process that lived through one of the two parts (from `begin` to `change`, from there to `end`): how large it was in its first third and
    in its last; and which of them grew. `change`: the end of the last engine of the first part. A daemon that found that engine when it was started
    holds a little less of it than one that has started it: no process handle, no driver's connection."""
    rows, problems = [], []
    for (name, pid), all_looks in seen.items():
        for part, since, until in ((1, begin, change), (2, change, end)):
            looks = [(at, size) for at, size in all_looks if since <= at < until]
            settled = [size for _, size in looks[YOUNG:]]
            seconds = looks[-1][0] - looks[0][0] if looks else 0.0
            if seconds < THROUGH * (until - since) or len(settled) < 6:
                continue
            row: dict[str, Any] = {
                "process": name,
                "pid": pid,
                "part": part,
                "seconds": round(seconds),
                "looks": len(looks),
            }
            for measure, (text, *_) in MEASURES.items():
                values = [getattr(size, measure) for size in settled]
                first, last = _thirds(values)
                row[measure] = [first, last, max(values)]
                limit = _limit(name, measure)
                if limit is not None and last - first > limit:
                    problems.append(f"{name} (pid {pid}): {text}: {first:,.10g} at first, {last:,.10g} in the end")
            rows.append(row)
    return rows, problems


def generations(seen: Mapping[tuple[str, int], Looks]) -> tuple[list[dict[str, Any]], list[str]]:
    """Of every kind of process of which there were several: whether the last of them were larger than the first, each at its largest."""
    kinds: dict[str, list[list[Size]]] = {}
    for (name, _), looks in seen.items():
        if len(looks) >= LEAST:
            kinds.setdefault(name, []).append([size for _, size in looks])
    rows, problems = [], []
    for name, lives in kinds.items():
        if len(lives) < 3:
            continue
        row: dict[str, Any] = {"process": name, "lives": len(lives)}
        for measure in MEASURES:
            largest = [max(getattr(size, measure) for size in life) for life in lives]
            first, last = _thirds(largest)
            row[measure] = [first, last, max(largest)]
            limit = _limit(name, measure)
            if measure == "own_kb" and limit is not None and name.startswith(VLLMS):
                limit = START_KB
            if limit is not None and last - first > limit:
                problems.append(f"{name}: the first had {first:g} {MEASURES[measure][0]}, the last {last:g}")
        rows.append(row)
    return rows, problems


def _table(first_column: str, rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    lines = [
        f"| {first_column} | {' | '.join(what for what, *_ in MEASURES.values())} |",
        "|---|" + "---|" * len(MEASURES),
    ]
    for title, row in rows:
        cells = " | ".join(" / ".join(f"{n:,.10g}" for n in row[measure]) for measure in MEASURES)
        lines.append(f"| {title} | {cells} |")
    return lines


def page(record: dict[str, Any], victims: Sequence[str], text: str) -> str:
    """For people."""
    turns = record["turns"]
    answered, failed = sum(t["answered"] for t in turns), sum(sum(t["failed"].values()) for t in turns)
    lost = sum(t["lost"] for t in turns)
    load = sum(t["load_s"] for t in turns) / 60
    between = sorted(t["since_last_s"] for t in turns[1:]) or [0.0]
    ready = sorted(t["ready_s"] for t in turns if t["ready_s"]) or [0.0]
    lines = [
        "# Soak",
        "",
        f"Made by `tests/run soak` ({record['date']}, {record['minutes']:g} minutes); do not edit. {text}",
        "",
        record["note"],
        "",
        f"**{answered + failed + lost} requests: {answered} answered, {failed} failed with an error, {lost} lost.** {len(turns)} kills, "
        f"{between[len(between) // 2]:.0f} s apart (median; at most {between[-1]:.0f} s). The engine was started {sum(1 for t in turns if t['ready_s'])} times, ready "
        f"after {ready[len(ready) // 2]:.0f} s (median; at most {ready[-1]:.0f} s), and under load for {load:.0f} minutes.",
        "",
        "| killed | times | requests answered | failed | lost | slowest answer | told, p50 / max | engine gone (daemon: cluster whole again), p50 / max |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for victim in victims:
        of = [turn for turn in turns if turn["victim"] == victim]
        if not of:
            continue
        told, gone = sorted(t["told_ms"] for t in of), sorted(t["gone_ms"] for t in of)
        times = " | ".join(f"{one[len(one) // 2]:.0f} / {one[-1]:.0f} ms" if one[-1] else "-" for one in (told, gone))
        failures = sum(sum(t["failed"].values()) for t in of)
        counts = f"{sum(t['answered'] for t in of)} | {failures} | {sum(t['lost'] for t in of)}"
        lines.append(f"| {victim} | {len(of)} | {counts} | {max(t['slowest_ms'] for t in of):.0f} ms | {times} |")
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
        "Processes that lived through a part of it. Median of the first third / of the last third / most:",
        "",
        *_table(
            "process (pid, seen for)",
            [(f"{row['process']} ({row['pid']}, {row['seconds']} s)", row) for row in record["processes"]],
        ),
        "",
        "Processes of which there were several, each at its largest. Median of the first third of them / of the last third / most:",
        "",
        *_table("process (how many)", [(f"{row['process']} ({row['lives']})", row) for row in record["kinds"]]),
    ]
    lines += ["", "## Problems", "", *([f"- {one}" for one in record["problems"]] or ["None."]), ""]
    return "\n".join(lines)
