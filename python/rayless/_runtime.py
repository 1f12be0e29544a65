"""The runtime of this process: which daemon it talks to and which groups it has. One per pid: a forked child starts
with none and leaves its parent's alone.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from rayless import _rayless

if TYPE_CHECKING:
    import weakref
    from typing import Protocol

    class Stoppable(Protocol):
        """A group."""

        def stop(self) -> None: ...


_lock = threading.Lock()
_current: Runtime | None = None


class Runtime:
    """What ``init`` found."""

    def __init__(self, run_dir: str, local: Any = None) -> None:
        import weakref

        self.pid = os.getpid()
        self.run_dir = run_dir
        #: The cluster that ``init(local=True)`` started, if it did.
        self.local = local
        #: Groups started here and not stopped yet.
        self.groups: weakref.WeakSet[Stoppable] = weakref.WeakSet()

    def identity(self) -> dict[str, Any]:
        """What the local daemon is. Raises ``ClusterNotFoundError``."""
        return _rayless.identify(self.run_dir)

    def status(self) -> dict[str, Any]:
        """``rayless status --json`` as objects. Raises ``ClusterNotFoundError``."""
        return _rayless.status(self.run_dir)

    def close(self) -> None:
        """Stops every group of this process, and the cluster if ``init`` started it."""
        if self.pid != os.getpid():
            return
        for group in list(self.groups):
            group.stop()
        if self.local is not None:
            self.local.stop()


def default_run_dir() -> str:
    """RAYLESS_RUN_DIR, else ``/run/rayless`` for root, else ``$XDG_RUNTIME_DIR/rayless``, else ``~/.rayless``."""
    if path := os.environ.get("RAYLESS_RUN_DIR"):
        return path
    if os.geteuid() == 0:
        return "/run/rayless"
    if path := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(path, "rayless")
    return os.path.expanduser("~/.rayless")


def init(
    address: str | None = None,
    *,
    local: bool = False,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: dict[str, float] | None = None,
    ignore_reinit_error: bool = False,
) -> dict[str, Any]:
    """Finds the daemon of this host (RAYLESS_RUN_DIR) and returns what it is. Starts nothing, unless ``local``.

    ``address`` (``IP:port`` of the head, or ``"auto"``) is a check: the daemon must belong to that cluster.
    ``local`` starts a cluster of one node on a loopback address, with ``num_cpus``, ``num_gpus`` and ``resources``;
    ``shutdown`` or an orderly end of this process ends it; after a kill, ``rayless stop --run-dir`` does.

    Raises ``ClusterNotFoundError`` where no daemon runs, or it belongs to another cluster.
    """
    global _current
    from rayless.exceptions import ClusterNotFoundError, RayError

    with _lock:
        if _current is not None and _current.pid == os.getpid():
            if not ignore_reinit_error:
                raise RayError(
                    "rayless.init() was called twice\nhint: call shutdown() in between, or give ignore_reinit_error=True"
                )
            return _current.identity()
        if local:
            from rayless._local import LocalCluster

            cluster = LocalCluster(num_cpus, num_gpus, resources)
            runtime = Runtime(cluster.run_dir, cluster)
        else:
            if num_cpus is not None or num_gpus is not None or resources is not None:
                raise ValueError(
                    "num_cpus, num_gpus and resources describe a cluster to start, and none is started\n"
                    "hint: add local=True, or give them to `rayless head` and `rayless join`"
                )
            runtime = Runtime(default_run_dir())
        identity = runtime.identity()
        if address not in (None, "auto") and address not in (identity["address"], identity["head_address"]):
            head = identity["head_address"] or identity["address"]
            raise ClusterNotFoundError(
                f"the daemon of this host belongs to the cluster of {head}, not of {address}\n"
                f"hint: `rayless join {address}` here first, or name another daemon with RAYLESS_RUN_DIR"
            )
        _adopt(runtime)
        return identity


def _adopt(runtime: Runtime) -> None:
    global _current
    import atexit

    _current = runtime
    atexit.register(runtime.close)


def current() -> Runtime:
    """The runtime of this process; found as by ``init()`` where that was not called."""
    runtime = _current
    if runtime is not None and runtime.pid == os.getpid():
        return runtime
    with _lock:
        if _current is None or _current.pid != os.getpid():
            runtime = Runtime(default_run_dir())
            runtime.identity()
            _adopt(runtime)
        assert _current is not None
        return _current


def shutdown() -> None:
    """Stops every group that this process started, and the cluster if ``init(local=True)`` did. Idempotent."""
    global _current
    with _lock:
        runtime, _current = _current, None
    if runtime is not None and runtime.pid == os.getpid():
        import atexit

        atexit.unregister(runtime.close)
        runtime.close()


def is_initialized() -> bool:
    """Whether ``init`` was called in this process, or something that calls it."""
    return _current is not None and _current.pid == os.getpid()


def status() -> dict[str, Any]:
    """The state of the cluster: the fields of ``rayless status --json``."""
    return current().status()


def nodes() -> list[dict[str, Any]]:
    """One dict per node, with Ray's keys where rayless has what they mean."""
    return [_as_ray_shows(node) for node in status()["nodes"]]


def _as_ray_shows(node: dict[str, Any]) -> dict[str, Any]:
    address, _, port = node["address"].rpartition(":")
    # A suspect node still has its resources; Ray knows two states only.
    alive = node["state"] in ("alive", "suspect")
    return {
        "NodeID": node["id"],
        "Alive": alive,
        "alive": alive,
        "NodeManagerAddress": address.strip("[]"),
        "NodeManagerHostname": node["name"],
        "NodeManagerPort": int(port),
        "NodeName": node["name"],
        "Resources": _floats(node["resources"]) if alive else {},
        "Labels": {},
    }


def cluster_resources() -> dict[str, float]:
    """All resources of the living nodes."""
    return _sum("resources")


def available_resources() -> dict[str, float]:
    """Those of them that nobody holds."""
    return _sum("available")


def _sum(kind: str) -> dict[str, float]:
    total: dict[str, float] = {}
    for node in status()["nodes"]:
        if node["state"] in ("alive", "suspect"):
            for name, quantity in node[kind].items():
                # Quantities are ten-thousandths: rounding keeps a sum of tenths free of binary dust.
                total[name] = round(total.get(name, 0.0) + quantity, 4)
    return total


def _floats(quantities: dict[str, Any]) -> dict[str, float]:
    return {name: float(quantity) for name, quantity in quantities.items()}
