"""The native module: groups, their calls, and the worker's side. Everything that waits releases the GIL."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

__version__: str

class _Reporter(Protocol):
    def waiting(self, text: str) -> None: ...
    def starting(self, ready: int, of: int) -> None: ...

def identify(run_dir: str) -> dict[str, Any]:
    """What the daemon of ``run_dir`` is. Raises ``ClusterNotFoundError``."""

def status(run_dir: str) -> dict[str, Any]:
    """The fields of ``rayless status --json``."""

def stop_group(run_dir: str, group: str | None) -> None:
    """Ends a group of the cluster, or all."""

def start_group(
    *,
    run_dir: str,
    name: str,
    bundles: Sequence[Sequence[tuple[str, float]]],
    strategy: str,
    placement_group: str | None,
    wait: float,
    versions: Sequence[tuple[str, str]],
    program: str,
    arguments: Sequence[str],
    directory: str,
    env: Sequence[tuple[str, str]],
    rank_env: Sequence[Sequence[tuple[str, str]]],
    boot: bytes,
    start_timeout: float,
    log_to_driver: bool,
    stuck_after: float,
    report: _Reporter,
) -> Group:
    """Places a group, starts its workers and returns when all take calls. Ctrl-C gives the start up."""

class Group:
    """A running group. In a forked child every method but ``stop`` raises ``RayError``."""

    id: str
    run_dir: str
    def ranks(self) -> list[dict[str, Any]]:
        """The fields of ``RankInfo``, in ascending rank."""
    step_deadline: float
    """Seconds that a step may take by the word of this node's daemon; 0 for no limit."""
    def run(
        self,
        method: str,
        payload: bytes,
        ranks: tuple[int, ...] | None,
        timeout: float | None,
        deadline: float | None = None,
        /,
    ) -> list[bytes]:
        """Calls and waits. ``method`` is for messages only. With ``deadline`` it is a step, and the group ends where it takes longer."""
    def submit(
        self,
        method: str,
        payload: bytes,
        ranks: tuple[int, ...] | None,
        timeout: float | None,
        deadline: float | None = None,
        /,
    ) -> Call:
        """Calls."""
    def failure(self) -> Exception | None:
        """Why the group is over, if it failed."""
    def on_failure(self, callback: Callable[[Exception], object], /) -> None:
        """Calls ``callback`` once when the group fails; at once if it has."""
    def stop(self) -> None:
        """Idempotent."""

class Call:
    """A call under way."""

    def wait(self, timeout: float | None, /) -> bool:
        """Whether it was done (or abandoned) within ``timeout`` seconds."""
    def take(self) -> list[bytes]:
        """The replies of a call that is done; raises what it failed with."""
    def is_done(self) -> bool: ...
    def missing(self) -> list[int]:
        """The asked ranks that have not replied."""
    def abandon(self) -> None:
        """Drops the replies and wakes who waits."""
    def on_done(self, callback: Callable[[], object], /) -> None:
        """Calls ``callback`` when it is done, in a thread of rayless; at most once per call."""

class Worker:
    """This process as a worker; raises ``RaySystemError`` where no keeper started it."""

    rank: int
    local_rank: int
    world_size: int
    def __init__(self) -> None: ...
    def boot(self) -> bytes: ...
    def ready(self, versions: Sequence[tuple[str, str]], /) -> None: ...
    def next_call(self) -> tuple[int, bool, bytes] | None:
        """Call id, whether this rank is asked, payload; ``None`` when the group is over."""
    def doing(self, text: str, /) -> None:
        """Notes what this rank is in; counts as progress."""
    def reply(self, call: int, raised: bool, payload: bytes, /) -> None: ...
