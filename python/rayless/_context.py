"""Where am I? For code that a worker runs; in a driver only the node is known."""

from __future__ import annotations

import os


class RuntimeContext:
    """What a process knows of its place. Ray's names where Ray has them."""

    __slots__ = ("_node_id", "group", "local_rank", "node_name", "rank", "world_size")

    def __init__(self) -> None:
        environ = os.environ
        #: Rank in its group, ``None`` outside a worker.
        self.rank = _number("RAYLESS_RANK")
        #: Place among the ranks of its group on this node.
        self.local_rank = _number("RAYLESS_LOCAL_RANK")
        #: Number of ranks of its group.
        self.world_size = _number("RAYLESS_WORLD_SIZE")
        #: Id of its group.
        self.group = environ.get("RAYLESS_GROUP")
        #: Name of its node.
        self.node_name = environ.get("RAYLESS_NODE_NAME")
        self._node_id = environ.get("RAYLESS_NODE_ID")

    def get_node_id(self) -> str:
        """Id of this node. A driver asks its daemon, and raises ``ClusterNotFoundError`` where there is none."""
        if self._node_id is None:
            from rayless import _runtime

            self._node_id = _runtime.current().identity()["node"]
        return self._node_id

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        """Indices of the GPUs that this worker holds, on its node."""
        return {"GPU": [index for index in os.environ.get("RAYLESS_GPU_IDS", "").split(",") if index]}


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    return int(text) if text is not None else None


def get_runtime_context() -> RuntimeContext:
    """Made anew at each call: it is cheap, and a forked process has its own."""
    return RuntimeContext()
