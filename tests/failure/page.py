"""docs/failure-matrix.md, made of what a run measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from faults import Fault

HEAD = """# Failure matrix

Made by `tests/failure/matrix.py` ({date}); do not edit. Two hosts are network namespaces on one machine, joined by a wire in user space
(`tests/wire`); a group has two ranks on each; the head and the driver are on host a. `--dead-after` is 3 s.

*told*: from the fault until the driver's pending call raises (in a call), its failure callback runs (idle), or its start raises (start). *gone*: from the fault
until the last process of the group is gone on both hosts; what is stopped or cut off ends once that is over. *back*: from the end of the fault (restart, wire
mended) until both nodes are alive and a group answers. Median and maximum of n repeats. After every repeat it was checked
that nothing is left: no process, no memfd, no socket file, no port.

A process that is silent but not stopped, on a node for which the head vouches, is given three times `--dead-after`: a false alarm costs a reload of the model. One that the kernel
holds stopped (SIGSTOP) is not. Not played here: vLLM's
own processes and a wall clock that jumps (see [the engine cells](failure-matrix-engines.md)), GPU memory (no GPU on the test machine).

"""


def text(record: dict[str, Any], faults: Sequence[Fault]) -> str:
    by_name = {fault.name: fault for fault in faults}
    cells = record["cells"]
    out = [HEAD.format(date=record["date"])]
    if record["note"]:
        out.append(f"{record['note']}\n\n")
    ends = [cell for cell in cells if by_name[cell["fault"]].leads_to == "ends"]
    out.append(
        "## What ends a group\n\n| fault | moment | n | told | gone | back | who notices |\n|---|---|---|---|---|---|---|\n"
    )
    for cell in ends:
        fault = by_name[cell["fault"]]
        n = max(len(cell["told_ms"]), len(cell["gone_ms"]))
        times = [span(cell[name]) for name in ("told_ms", "gone_ms", "back_ms")]
        out.append(f"| {fault.text} | {cell['moment']} | {n} | {' | '.join(times)} | {fault.who} |\n")
    out.append(
        "\n## What a group outlives\n\n"
        "*slowest*: the slowest call of 2 KiB to all four ranks while the fault was there (one about every 10 ms).\n\n"
        "| fault | moment | n | lasted | calls answered | slowest | start | back | who notices |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    for cell in cells:
        fault = by_name[cell["fault"]]
        if fault.leads_to == "lives":
            times = [span(cell[name]) for name in ("slowest_ms", "start_ms", "back_ms")]
            calls = str(cell["calls"]) if cell["calls"] else "-"
            words = [
                fault.text,
                cell["moment"],
                str(len(cell["back_ms"])),
                f"{fault.lasts:g} s",
                calls,
                *times,
                fault.who,
            ]
            out.append(f"| {' | '.join(words)} |\n")
    out.append(
        "\n## What leaves a call unanswered\n\n| fault | n | the call raises after (limit 2 s) | back |\n|---|---|---|---|\n"
    )
    for cell in cells:
        fault = by_name[cell["fault"]]
        if fault.leads_to == "stuck":
            out.append(
                f"| {fault.text} | {len(cell['told_ms'])} | {span(cell['told_ms'])} | {span(cell['back_ms'])} |\n"
            )
    out.append("\n## The lines\n\nWhat the driver's error says first, with changing numbers as `N`:\n\n")
    for cell in cells:
        lines = sorted({re.sub(r"\d+(\.\d+)?", "N", line) for line in cell["lines"]})
        out += [
            f"- {by_name[cell['fault']].text}, {cell['moment']}: {' / '.join(f'`{line}`' for line in lines)}\n"
            for _ in lines[:1]
        ]
    wrong = [
        (cell, what) for cell in cells for what in [*cell["problems"], *(f"left: {left}" for left in cell["left"])]
    ]
    out.append("\n## What was not as it must be\n\n")
    out += [f"- {by_name[cell['fault']].text}, {cell['moment']}: {what}\n" for cell, what in wrong] or ["Nothing.\n"]
    return "".join(out)


def span(times: Sequence[float]) -> str:
    if not times:
        return "-"
    middle, most = sorted(times)[len(times) // 2], max(times)
    if most < 1000:
        return f"{middle:.0f} / {most:.0f} ms"
    return f"{middle / 1000:.2f} / {most / 1000:.2f} s"
