"""What the failure tests run on every rank."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import rayless

FOR_EVER = 10**6


class Hosted:
    """`folder`: where a rank leaves a file once it has arrived somewhere (all hosts of a test share the disk)."""

    def __init__(self, folder: str, load: bool = False) -> None:
        self.folder = folder
        self.rank = rayless.get_runtime_context().rank
        if load:  # like loading weights: nothing is answered meanwhile
            self.arrive("load")
            self.wait_to_go()

    def arrive(self, where: str) -> None:
        Path(self.folder, f"{where}.{self.rank}").touch()

    def wait_to_go(self) -> None:
        go = Path(self.folder, "go")
        while not go.exists():
            time.sleep(0.002)

    def step(self, data: bytes | str) -> int:
        return len(data)

    def hold(self) -> None:
        """A long step in Python."""
        self.arrive("hold")
        time.sleep(FOR_EVER)

    def hold_lock(self) -> None:
        """A long step in C that does not give Python's lock back: no other thread of the worker runs."""
        self.arrive("hold")
        ctypes.PyDLL(None).sleep(FOR_EVER)

    def leave(self, rank: int, code: int) -> None:
        """One rank ends its process in the middle of a step; the others stay in it."""
        self.arrive("hold")
        self.wait_to_go()
        if self.rank == rank:
            os._exit(code)
        time.sleep(FOR_EVER)
