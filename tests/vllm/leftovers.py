"""What an engine may leave in shared memory."""

from __future__ import annotations

from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def shared_memory() -> set[str]:
    """Every name there is now."""
    return {path.name for path in SHARED_MEMORY.iterdir()}


def unused_shared_memory(before: set[str]) -> set[str]:
    """Names that were not there before and that no process has mapped: other runs on this machine use theirs."""
    new = shared_memory() - before
    if not new:
        return set()
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped += maps.read_text()
        except OSError:  # gone meanwhile
            continue
    return {name for name in new if f"{SHARED_MEMORY}/{name}" not in mapped}


def remove(names: set[str]) -> None:
    """Removes what vLLM's own launcher leaves: the names of its CPU workers' memory stay when they are ended by a signal."""
    for name in names:
        (SHARED_MEMORY / name).unlink(missing_ok=True)
