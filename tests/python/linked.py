"""A group whose ranks are linked, and its driver: a JSON command a line in, a JSON answer a line out.

The driver runs on a host of its own (a network namespace), so it is a process of its own.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import rayless
from rayless import fabric
from rayless.exceptions import LinkError


class Linked:
    """Opens the end of a link that is its own; what goes wrong is the answer."""

    def __init__(self) -> None:
        self.rank = rayless.get_runtime_context().rank
        self.ends: dict[int, Any] = {}

    def open(self, sender: int, receiver: int, channel: int = 0, timeout: float = 30) -> Any:
        try:
            if self.rank == sender:
                self.ends[channel] = fabric.send_link(receiver, channel, timeout=timeout)
            elif self.rank == receiver:
                self.ends[channel] = fabric.recv_link(sender, channel, timeout=timeout)
        except LinkError as error:
            return f"{type(error).__name__}: {error}"
        return "open"

    def move(self, sender: int, channel: int, size: int) -> bool:
        """Sends a message of ``size`` bytes; whether it came as it was."""
        data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        memory = ctypes.create_string_buffer(data if self.rank == sender else size, size)
        if channel not in self.ends:
            return True
        link = self.ends[channel]
        if self.rank == sender:
            link.send([("x", "uint8", (size,), ctypes.addressof(memory), size)], b"", 1, 30)
            return True
        link.recv_header(1, 30)
        link.recv_payload([(ctypes.addressof(memory), size)], 30)
        return bool(memory.raw == data)

    def close(self, channel: int) -> None:
        link = self.ends.pop(channel, None)
        if link is not None:
            link.close()

    def echo(self, word: str) -> str:
        return word


def main() -> None:
    group: Any = None

    def do(action: str, words: dict[str, Any]) -> Any:
        nonlocal group
        if action == "start":
            group = rayless.WorkerGroup.start(Linked, **words)
            return [rank.node_name for rank in group.ranks]
        if action == "call":
            return group.call(words["method"], *words["args"], timeout=60)
        if action == "links":
            return group.links()
        group.stop()
        return None

    for line in sys.stdin:
        words = json.loads(line)
        try:
            answer = {"ok": do(words.pop("do"), words)}
        except (rayless.exceptions.RayError, ValueError, TimeoutError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
