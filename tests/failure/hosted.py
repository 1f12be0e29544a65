"""What the failure tests run on every rank."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import rayless
from rayless import fabric

FOR_EVER = 10**6


class Hosted:
    """`folder`: where a rank leaves a file once it has arrived somewhere (all hosts of a test share the disk)."""

    def __init__(self, folder: str, load: bool = False) -> None:
        self.folder = folder
        self.rank = rayless.get_runtime_context().rank
        self.links: list[object] = []  # held, so that they stay open
        self.ends: tuple[fabric.SendLink, fabric.RecvLink] | None = None
        self.exchanged = 0
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

    def say(self, text: str) -> None:
        """Into the rank's log."""
        print(text, flush=True)

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

    def cross(self, sender: int, receiver: int, size: int, messages: int) -> None:
        """Messages of `size` bytes from one rank to another; the link stays open, as those of a serving engine do."""
        if self.rank == sender:
            self.links.append(link := fabric.send_link(receiver, timeout=60))
            for step in range(messages):
                data = pattern(size, step)
                link.send([("x", "uint8", (size,), ctypes.addressof(data), size)], tag=step, timeout=60)
        elif self.rank == receiver:
            self.links.append(inbound := fabric.recv_link(sender, timeout=60))
            for step in range(messages):
                inbound.recv_header(step, 60)
                data = (ctypes.c_char * size)()
                inbound.recv_payload([(ctypes.addressof(data), size)], 60)
                assert data.raw == pattern(size, step).raw

    def exchange(self, size: int) -> int:
        """Every rank sends a tensor of `size` bytes to one on the other host and takes one from it, on links that stay open; returns
        how many it has exchanged so far."""
        half = rayless.get_runtime_context().world_size // 2
        peer = (self.rank + half) % (2 * half)
        near = self.rank < half
        if self.ends is None:
            if near:
                there = fabric.send_link(peer, timeout=120)
                self.ends = there, fabric.recv_link(peer, timeout=120)
            else:
                back = fabric.recv_link(peer, timeout=120)
                self.ends = fabric.send_link(peer, timeout=120), back
        link, inbound = self.ends
        step = self.exchanged
        data, came = pattern(size, step + self.rank), (ctypes.c_char * size)()
        for sends in (near, not near):
            if sends:
                link.send([("x", "uint8", (size,), ctypes.addressof(data), size)], tag=step, timeout=120)
            else:
                inbound.recv_header(step, 120)
                inbound.recv_payload([(ctypes.addressof(came), size)], 120)
        assert came.raw == pattern(size, step + peer).raw
        self.exchanged += 1
        return self.exchanged


def pattern(size: int, step: int) -> ctypes.Array[ctypes.c_char]:
    """Bytes of which no two messages have the same at one place."""
    piece = bytes((i * 167 + step) % 256 for i in range(251))
    return (ctypes.c_char * size).from_buffer_copy((piece * (size // 251 + 1))[:size])
