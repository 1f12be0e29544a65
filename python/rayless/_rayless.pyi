"""The native module: groups, their calls, and the worker's side. Everything that waits releases the GIL."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

#: Name, dtype (torch's name without ``torch.``), shape, address, bytes.
_Tensor = tuple[str, str, Sequence[int], int, int]

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
    def links(self) -> list[dict[str, Any]]:
        """The entries that the group has in ``links`` of ``rayless status --json``."""
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
    def send_link(self, to: int, channel: int = 0, *, timeout: float) -> SendLink:
        """The sending end of a link to rank ``to``; it is there when that rank asks for the other end."""
    def recv_link(self, from_rank: int, channel: int = 0, *, timeout: float) -> RecvLink:
        """The receiving end of a link from rank ``from_rank``."""

class SendLink:
    """The sending end of a link. Memory given to it is read until the call returns or, for ``isend``, the handle is done."""

    from_rank: int
    to_rank: int
    channel: int
    def send(
        self, tensors: Sequence[_Tensor], extra: bytes | None = None, tag: int = 0, timeout: float | None = None
    ) -> None:
        """Returns when the memory may be reused."""
    def isend(
        self, tensors: Sequence[_Tensor], extra: bytes | None = None, tag: int = 0, keep: object = None
    ) -> SendHandle:
        """Returns at once; ``keep`` is held until the message has left."""
    def isend_cuda(
        self, tensors: Sequence[_Tensor], extra: bytes | None, tag: int, stream: int, device: int, keep: object
    ) -> CudaSendHandle:
        """Sends tensors in GPU memory that ``stream`` of ``device`` will have computed when it comes to this point.

        Returns at once; ``keep`` is held until the tensors have been read.
        """
    def pending(self) -> int:
        """Messages that were accepted and have not left."""
    def close(self, timeout: float = 5.0) -> None:
        """Waits for what has not left, gives up the rest, and closes. Idempotent."""
    def report(self) -> dict[str, Any]: ...
    def counters(self) -> dict[str, int]:
        """``work_requests``, ``doorbells``, ``completions`` (RDMA), ``sleeps``."""

class SendHandle:
    """A message under way."""

    def is_completed(self) -> bool: ...
    def wait(self, timeout: float | None = None) -> None: ...

class CudaSendHandle:
    """A message of GPU tensors under way. An error of a method: the link is lost."""

    def is_completed(self) -> bool:
        """Whether the tensors have been read."""
    def wait_stream(self, stream: int) -> None:
        """Makes a stream wait until the tensors have been read; the host does not wait."""
    def wait(self, timeout: float | None = None) -> None:
        """Waits, with the host, until the tensors have been read."""

class CudaRecvHandle:
    """A payload that is coming into GPU memory."""

    def is_completed(self) -> bool:
        """Whether the buffers are filled."""
    def wait_stream(self, stream: int) -> None:
        """Makes a stream wait until the buffers are filled; the host does not wait."""

class Announced:
    """What a message says of itself; ``tensors`` are (name, dtype, shape)."""

    sequence: int
    tag: int
    device: bool
    """Whether the tensors are in GPU memory at the sender."""
    extra: bytes
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]

class RecvLink:
    """The receiving end of a link. Memory given to it belongs to it until the call returns."""

    from_rank: int
    to_rank: int
    channel: int
    def recv_header(self, step: int | None = None, timeout: float | None = None) -> Announced:
        """Waits for the next message; asked again before its payload is taken, it says the same."""
    def recv_payload(self, buffers: Sequence[tuple[int, int]], timeout: float | None = None) -> None:
        """Takes the payload into (address, bytes), one per tensor."""
    def recv_cuda(
        self,
        buffers: Sequence[tuple[int, int]],
        stream: int,
        device: int,
        keep: object,
        timeout: float | None = None,
    ) -> CudaRecvHandle:
        """Receives the announced message's payload into GPU memory, for ``stream`` of ``device``.

        Returns at once: streams wait, once told by ``wait_stream`` (where they cannot, the host waits here, for at most
        ``timeout``). ``keep`` is held until the buffers are filled.
        """
    def recv_cuda_ahead(
        self, buffers: Sequence[tuple[int, int]], stream: int, device: int, keep: object
    ) -> CudaRecvHandle | None:
        """As :meth:`recv_cuda`, for the next message before its header has come; ``None``, and nothing has happened,
        where its way is not known. :meth:`confirm_cuda` must follow."""
    def confirm_cuda(self, step: int | None = None, timeout: float | None = None) -> None:
        """Waits for the header of what was received ahead; if that is another message's, the link is lost."""
    def close(self) -> None:
        """Idempotent; ends a call of another thread."""
    def report(self) -> dict[str, Any]: ...
    def counters(self) -> dict[str, int]: ...

def link_pair(
    transport: str,
    *,
    from_rank: int = 0,
    to_rank: int = 1,
    channel: int = 0,
    verify: bool = False,
    max_message: int | None = None,
    streams: int = 1,
    addresses: tuple[str, str] | None = None,
) -> tuple[SendLink, RecvLink]:
    """Both ends of a link in this process. ``addresses``: the receiver's and the sender's, for tcp and rdma."""
