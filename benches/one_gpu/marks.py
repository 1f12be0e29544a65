"""Where the time of a decode step goes, from the marks of `tracing.py`: medians in microseconds, of every rank's host and between the stages."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

#: Steps at either end that are not typical: prefill, caches, the end of the requests.
LEFT_OUT = 10
#: What a rank marks: name and nanoseconds.
Marks = list[tuple[str, int]]


def steps(marks: Marks) -> Iterator[Marks]:
    """The marks of each step with tokens in it, to the beginning of the next one; an empty step between counts to the one before."""
    step: Marks = []
    empty = False
    for name, at in marks:
        if name in ("step<", "empty<"):
            empty = name == "empty<"
        if name == "step<":
            if step:
                yield step
            step = []
        if step or name == "step<":
            step.append((f"(empty) {name}" if empty else name, at))


def offsets(marks: Marks) -> list[tuple[str, float]]:
    """Every mark's distance from the beginning of its step."""
    found: dict[str, list[float]] = {}
    chosen = list(steps(marks))[LEFT_OUT:-LEFT_OUT]
    for step in chosen:
        seen: dict[str, int] = {}
        for name, at in step:
            seen[name] = seen.get(name, 0) + 1
            label = name if seen[name] == 1 else f"{name} ({seen[name]})"
            found.setdefault(label, []).append((at - step[0][1]) / 1e3)
    usual = [(name, statistics.median(values)) for name, values in found.items() if 2 * len(values) > len(chosen)]
    begins = [step[0][1] for step in chosen]
    if len(begins) > 1:
        period = statistics.median((after - before) / 1e3 for before, after in itertools.pairwise(begins))
        usual.append(("the next step", period))
    return sorted(usual, key=lambda item: item[1])


def between(first: Marks, last: Marks) -> dict[str, list[float]]:
    """Distances on the GPU between two stages, one a step: both ranks' marks are on one clock."""

    def of(marks: Marks, name: str) -> list[int]:
        return [at for found, at in marks if found == name]

    sent, taken = of(first, "hidden_sent<"), of(last, "hidden_taken>")
    count = min(len(sent), len(taken))
    hops = [(b - a) / 1e3 for a, b in zip(sent[-count:], taken[-count:], strict=True)]
    found = {"end of stage 0's kernels .. stage 1 has what it was sent": hops}
    for number, marks in enumerate((first, last)):
        pairs = zip(of(marks, "graph<"), of(marks, "graph>"), strict=False)
        found[f"forward pass of stage {number}"] = [(b - a) / 1e3 for a, b in pairs]
    return found


def line(name: str, values: Sequence[float]) -> None:
    """A median with its extremes."""
    values = sorted(values)
    if values:
        ninth = values[int(0.9 * (len(values) - 1))]
        print(
            f"    {name:60} {statistics.median(values):8.1f}  (min {values[0]:.1f}, p90 {ninth:.1f}, n = {len(values)})"
        )


def show(ranks: list[dict[str, Any]]) -> None:
    """Prints one engine's trace."""
    for number, rank in enumerate(ranks):
        print(f"  host of rank {number}")
        before = 0.0
        for name, at in offsets([(name, at) for name, at in rank["host"]]):
            print(f"    {name:40} {at:8.1f}  +{at - before:.1f}")
            before = at
    if len(ranks) == 2:
        print("  GPU")
        # `tracing.py` moved each rank's marks to the host's clock; back on their own they are on one clock exactly.
        raw = [[(name, at - rank["offset"]) for name, at in rank["gpu"]] for rank in ranks]
        for name, values in between(raw[0], raw[1]).items():
            line(name, values[LEFT_OUT:-LEFT_OUT])
