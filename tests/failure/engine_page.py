"""docs/failure-matrix-engines.md, made of what a run measured."""

from __future__ import annotations

import re
from typing import Any

from engine_faults import BY_NAME
from page import span

HEAD = """# Failure matrix: engines

Made by `tests/failure/engines.py` ({date}); do not edit. Real vLLM (CPU build) serves a tiny Llama in two pipeline stages, stage 0 and `vllm serve` on host a with the head,
stage 1 on host b. The hosts are network namespaces on one machine, joined by a wire in user space (`tests/wire`). `--dead-after` is 3 s. The wall clock of daemons and
keepers is set by Debian's libfaketime (a kernel has one for all); their monotonic clock is left alone.

*request*: in the middle of a long streamed answer. *idle*: nobody asks. *loading*: both ranks are about to load their weights. All times from the fault, median and maximum of n repeats: *client*: until the client's
pending request fails; *health*: until `/health` is not 200; *ended*: until `vllm serve` has ended; *gone*: until the last process of the engine is gone on both hosts (what is stopped or cut off ends once that is over).
*back*: from the end of the fault until both nodes are alive and hold nothing, or until the next request is answered. After each it was checked that nothing is left: no process, no name in /dev/shm, no socket, nothing held.

"""


def text(record: dict[str, Any]) -> str:
    cells = [cell for cell in record["cells"] if _count(cell) or cell["problems"]]
    out = [HEAD.format(date=record["date"])]
    if record["note"]:
        out.append(f"{record['note']}\n\n")
    out.append(
        "## What ends an engine\n\n| fault | moment | n | client | health | ended | gone | back | who notices |\n"
    )
    out.append("|---|---|---|---|---|---|---|---|---|\n")
    for cell in cells:
        fault = BY_NAME[cell["fault"]]
        if fault.leads_to == "ends":
            names = ("told_ms", "unhealthy_ms", "ended_ms", "gone_ms", "back_ms")
            words = [fault.text, cell["moment"], str(_count(cell)), *(span(cell[name]) for name in names), fault.who]
            out.append(f"| {' | '.join(words)} |\n")
    out.append(
        "\n## What an engine outlives\n\nNot one request failed, unless the last section says so. *slowest*: the slowest answer of four tokens.\n\n"
    )
    out.append(
        "| fault | moment | n | lasted | answered | slowest | ready | back | who notices |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    for cell in cells:
        fault = BY_NAME[cell["fault"]]
        if fault.leads_to == "lives":
            times = [span(cell[name]) for name in ("slowest_ms", "ready_ms", "back_ms")]
            words = [fault.text, cell["moment"], str(_count(cell)), f"{fault.lasts:g} s", str(cell["answered"] or "-")]
            out.append(f"| {' | '.join([*words, *times, fault.who])} |\n")
    out.append(
        "\n## The lines\n\nNumbers are shown as `N`. *client*: the error of the pending request. *status*: the cause of the group in `rayless status`. *log*: what the server's log says first.\n\n"
    )
    for cell in cells:
        said = [
            f"{who} {' / '.join(f'`{line}`' for line in (cell[name] if name == 'health' else _lines(cell[name])))}"
            for who, name in (("client", "errors"), ("health", "health"), ("status", "causes"), ("log", "lines"))
            if cell[name]
        ]
        if said and BY_NAME[cell["fault"]].leads_to == "ends":
            out.append(f"- {BY_NAME[cell['fault']].text}, {cell['moment']}: {'; '.join(said)}\n")
    wrong = [
        (cell, what) for cell in cells for what in [*cell["problems"], *(f"left: {left}" for left in cell["left"])]
    ]
    out.append("\n## What was not as it must be\n\n")
    out += [f"- {BY_NAME[cell['fault']].text}, {cell['moment']}: {what}\n" for cell, what in wrong] or ["Nothing.\n"]
    return "".join(out)


def _count(cell: dict[str, Any]) -> int:
    return max(len(cell["gone_ms"]), len(cell["back_ms"]))


def _lines(lines: list[str]) -> list[str]:
    return sorted({re.sub(r"\d+(\.\d+)?", "N", line) for line in lines})
