"""docs/failure-matrix-engines.json: what runs of the engine cells measured, a run for each machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine_cells import EngineCell, cells
from engine_stage import build


@dataclass
class Run:
    """What was played on a machine, possibly in several goes."""

    machine: str
    #: Of the last go.
    date: str = ""
    note: str = ""
    cells: dict[str, EngineCell] = field(default_factory=dict)

    def add(self, cell: EngineCell) -> None:
        """What was seen in further repeats."""
        known = self.cells.setdefault(cell.name, EngineCell(cell.fault, cell.moment))
        known.add(cell)
        self.date = time.strftime("%Y-%m-%d")

    def forget(self, names: set[str]) -> None:
        """Drops cells, to be played anew."""
        self.cells = {name: cell for name, cell in self.cells.items() if name not in names}


@dataclass
class Record:
    """All runs, oldest first."""

    runs: list[Run] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Record:
        """What a file has; nothing where there is none."""
        found = cls()
        if file.exists():
            for run in json.loads(file.read_text())["runs"]:
                made = [EngineCell(**cell) for cell in run.pop("cells")]
                found.runs.append(Run(**run, cells={cell.name: cell for cell in made}))
        return found

    def run(self, machine: str) -> Run:
        """That of a machine, new where it has none."""
        for run in self.runs:
            if run.machine == machine:
                return run
        self.runs.append(Run(machine))
        return self.runs[-1]

    def merge(self, other: Record) -> None:
        """Adds what other goes measured, each on its machine."""
        for theirs in other.runs:
            mine = self.run(theirs.machine)
            for cell in theirs.cells.values():
                mine.add(cell)
            mine.date = max(mine.date, theirs.date)
            mine.note = theirs.note or mine.note

    def write(self, file: Path) -> None:
        """The measured numbers, and the page made of them."""
        import engine_page

        order = {f"{fault.name}-{moment}": index for index, (fault, moment) in enumerate(cells())}
        runs: list[dict[str, Any]] = []
        for run in self.runs:
            known = sorted((name for name in run.cells if name in order), key=lambda name: order[name])
            if known:
                runs.append({**asdict(run), "cells": [asdict(run.cells[name]) for name in known]})
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
        file.with_suffix(".md").write_text(engine_page.text(runs))


def this_machine() -> str:
    """In a few words: what there is, and which vLLM."""
    vllm = importlib.metadata.version("vllm")
    words = [f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"]
    if build().gpu:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("\n")
        words.append(names[0])
    return ", ".join([*words, f"vLLM {vllm}"])
