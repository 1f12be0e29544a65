"""Tensors from one worker to another, over the link that rayless chose for the pair: shared memory, RDMA or TCP.

    sender = TensorSender(send_link(to=1))              # in rank 0's worker
    handle = sender.isend({"hidden": h, "residual": r})
    handle.wait()                                       # h and r may be written again

    receiver = TensorReceiver(recv_link(from_rank=0))   # in rank 1's worker
    message = receiver.irecv()                          # waits for the header: names, dtypes, shapes
    message.wait()                                      # waits for the bytes
    message.values["hidden"]

A link goes one way and keeps the order. Its messages come whole and once, or it is lost for good
(``LinkLostError``, at both ends with one cause); a mistake of the caller's is found before anything is sent
(``LinkRejectedError``) and costs nothing else. ``step`` numbers: a receiver that names one gets that step's message or
``LinkLostError``, never another step's tensors.

CUDA tensors are read and filled by streams: nothing but ``is_completed`` and waits with a ``timeout`` looks at the GPU from the
host. On one host payloads go from GPU to GPU, elsewhere through pinned memory at both ends; ``link.report()["gpu"]`` says which, and why.
``RAYLESS_GPU_HOP=staged`` keeps to pinned memory, ``host`` also lets the host do the waiting: for measuring, and for finding faults.

A link is used by one thread at a time. torch is imported with the first ``TensorSender`` or ``TensorReceiver``.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rayless._rayless import Announced, CudaSendHandle, RecvLink, SendHandle, SendLink, link_pair
from rayless.exceptions import LinkLostError, LinkRejectedError, RayError

if TYPE_CHECKING:
    import torch

    from rayless._rayless import Worker as NativeWorker

__all__ = [
    "Incoming",
    "RecvLink",
    "SendHandle",
    "SendLink",
    "Sending",
    "TensorReceiver",
    "TensorSender",
    "link_pair",
    "recv_link",
    "send_link",
]

#: Seconds that the other end of a link has to ask for it.
OPEN_SECONDS = 60.0


def send_link(to: int, channel: int = 0, *, timeout: float = OPEN_SECONDS) -> SendLink:
    """The sending end of the link from this rank to rank ``to``; both ends ask for it, in any order.

    ``channel`` tells several links between the same two ranks apart. Raises ``LinkUnavailableError`` where no
    transport is both allowed and working, or the other end is not asked for within ``timeout`` seconds.
    """
    return _worker().send_link(to, channel, timeout=timeout)


def recv_link(from_rank: int, channel: int = 0, *, timeout: float = OPEN_SECONDS) -> RecvLink:
    """The receiving end of the link from rank ``from_rank`` to this one. See :func:`send_link`."""
    return _worker().recv_link(from_rank, channel, timeout=timeout)


def _worker() -> NativeWorker:
    from rayless import _worker

    host = _worker.current()
    if host is None:
        raise RayError(
            "this process is no worker of a group\n"
            "hint: links join the workers of a `WorkerGroup`; `rayless.fabric.link_pair` makes both ends in one process"
        )
    return host.native


class Sending(Protocol):
    """A message under way."""

    def wait(self, timeout: float | None = None) -> None:
        """Its tensors may be written again: by anyone, or, for CUDA tensors, by what is put on the current stream from now on."""
        ...

    def is_completed(self) -> bool:
        """Whether that is so already."""
        ...


class _DeviceSend:
    """A message of CUDA tensors: who waits is the stream, not the host."""

    def __init__(self, handle: CudaSendHandle, device: torch.device) -> None:
        self._handle = handle
        self._device = device

    def wait(self, timeout: float | None = None) -> None:
        import torch

        if timeout is not None:
            self._handle.wait(timeout)
        else:
            self._handle.wait_stream(torch.cuda.current_stream(self._device).cuda_stream)

    def is_completed(self) -> bool:
        return bool(self._handle.is_completed())


class TensorSender:
    """Sends dicts of tensors over a link."""

    def __init__(self, link: SendLink) -> None:
        #: The link.
        self.link = link

    def isend(self, values: Mapping[str, Any], *, step: int = 0, note: Any = None) -> Sending:
        """Sends a message without waiting and gives its handle (``wait(timeout=None)``, ``is_completed()``).

        The tensors in ``values`` must be contiguous, and must not be written before the handle is done; they are kept
        alive until then. CUDA tensors may still be computed on the current stream. Other values, and
        ``note``, are pickled: they should be few and repeat, since their bytes cross the link only when they change.
        """
        host, device, others = _split(values)
        if device and host:
            # Two messages, for their bytes take different ways; the first says that a second follows.
            self._isend(host, _pack(None, others, note, True), step)
            return self._isend_cuda(device, _pack("cuda", {}, None, False), step)
        if device:
            return self._isend_cuda(device, _pack("cuda", others, note, False), step)
        return self._isend(host, _pack(None, others, note, False), step)

    def send(self, values: Mapping[str, Any], *, step: int = 0, note: Any = None, timeout: float | None = None) -> None:
        """Sends a message and returns when its tensors may be written again. The order of dicts of both devices is kept."""
        self.isend(values, step=step, note=note).wait(timeout)

    def close(self) -> None:
        """Closes the link when what was sent has left."""
        self.link.close()

    def _isend(self, tensors: dict[str, torch.Tensor], extra: bytes, step: int) -> SendHandle:
        described, held = self._describe(tensors)
        return self.link.isend(described, extra, step, held)

    def _isend_cuda(self, tensors: dict[str, torch.Tensor], extra: bytes, step: int) -> Sending:
        import torch

        described, held = self._describe(tensors)
        device = held[0].device
        if device.type != "cuda" or any(tensor.device != device for tensor in held):
            devices = ", ".join(sorted({str(tensor.device) for tensor in held}))
            raise self._rejected("device", f"tensors on {devices}", "give tensors of one CUDA device, or of the host")
        stream = torch.cuda.current_stream(device).cuda_stream
        return _DeviceSend(self.link.isend_cuda(described, extra, step, stream, device.index, held), device)

    def _describe(
        self, tensors: dict[str, torch.Tensor]
    ) -> tuple[list[tuple[str, str, tuple[int, ...], int, int]], list[torch.Tensor]]:
        described = []
        held = []
        for name, given in tensors.items():
            tensor = given
            if not tensor.is_contiguous():
                what = f"tensor `{name}` of shape {tuple(tensor.shape)} is not contiguous (strides {tensor.stride()})"
                raise self._rejected("not contiguous", what, "give `tensor.contiguous()`")
            if tensor.is_conj() or tensor.is_neg():
                # Its memory holds other numbers than it shows.
                tensor = tensor.resolve_conj().resolve_neg()
            described.append((name, _dtype_name(tensor.dtype), tuple(tensor.shape), tensor.data_ptr(), tensor.nbytes))
            held.append(tensor)
        return described, held

    def _rejected(self, kind: str, what: str, hint: str) -> LinkRejectedError:
        link = self.link
        name = f"link {link.from_rank}->{link.to_rank}.{link.channel} of group {link.report()['group'][:8]}"
        return LinkRejectedError(f"{name}: {what}\nhint: {hint}", name, link.from_rank, link.to_rank, kind)


class TensorReceiver:
    """Receives dicts of tensors from a link."""

    def __init__(self, link: RecvLink) -> None:
        #: The link.
        self.link = link
        self._open: Incoming | None = None
        #: What was received before its header came: dtypes and shapes, and the step.
        self._ahead: tuple[list[tuple[str, tuple[int, ...]]], int | None] | None = None

    def irecv(self, *, step: int | None = None, timeout: float | None = None) -> Incoming:
        """Waits for the next message's header and allocates its tensors, on the kind of device that they were sent from.

        The bytes are in them after ``wait()`` of what is returned. A message before this one whose bytes
        nobody has asked for is taken first.
        """
        import torch

        announced = self._next(step, timeout)
        device, others, note, more = _unpack(announced.extra)
        values: dict[str, Any] = {
            name: torch.empty(shape, dtype=_dtype(dtype), device=device) for name, dtype, shape in announced.tensors
        }
        self._open = Incoming(self.link, values, list(values.values()), note)
        values.update(others)
        if more:
            first = self._open
            second = self.irecv(step=step, timeout=timeout)
            values.update(second.values)
            second.values, second.note = values, first.note
        return self._open

    def recv(self, *, step: int | None = None, timeout: float | None = None) -> dict[str, Any]:
        """A whole message."""
        message = self.irecv(step=step, timeout=timeout)
        message.wait(timeout)
        return message.values

    def irecv_into(
        self, tensors: Sequence[torch.Tensor], *, step: int | None = None, timeout: float | None = None
    ) -> Incoming:
        """As :meth:`irecv`, into tensors of the caller's, which must be those of the message in dtype and shape."""
        announced = self._next(step, timeout)
        expected = _form(tensors)
        found = [(dtype, shape) for _, dtype, shape in announced.tensors]
        if found != expected or not all(tensor.is_contiguous() for tensor in tensors):
            name = repr(self.link)
            raise LinkRejectedError(
                f"{name}: the message has {found}, but buffers for {expected} were given\n"
                "hint: give contiguous buffers of the shapes that the header announced",
                name,
                self.link.from_rank,
                self.link.to_rank,
                "mismatch",
            )
        _, others, note, _ = _unpack(announced.extra)
        self._open = Incoming(self.link, dict(others), list(tensors), note)
        return self._open

    def irecv_ahead(self, tensors: Sequence[torch.Tensor], *, step: int | None = None) -> Incoming:
        """As :meth:`irecv_into`, by who knows what the next message is: where its payload's way is known, nobody waits for the header, and
        the current stream alone for the payload. Call :meth:`confirm` before anything made of the tensors leaves this process.
        """
        self._settle(None)
        device = tensors[0].device
        if device.type == "cuda" and all(tensor.is_contiguous() for tensor in tensors):
            import torch

            buffers = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
            stream = torch.cuda.current_stream(device).cuda_stream
            handle = self.link.recv_cuda_ahead(buffers, stream, device.index, list(tensors))
            if handle is not None:
                self._ahead = (_form(tensors), step)
                message = Incoming(self.link, {}, list(tensors), None)
                message._done = handle
                return message
        return self.irecv_into(tensors, step=step)

    def confirm(self, timeout: float | None = None) -> None:
        """Waits for the header of what :meth:`irecv_ahead` received last, if it has not come. ``LinkLostError`` where that was another
        message."""
        if self._ahead is None:
            return
        expected, step = self._ahead
        announced = self.link.recv_header(step, timeout)
        found = [(dtype, shape) for _, dtype, shape in announced.tensors]
        if found != expected:
            name = repr(self.link)
            self.link.close()
            raise LinkLostError(
                f"{name}: the message has {found}, but {expected} was received ahead of its header",
                name,
                self.link.from_rank,
                self.link.to_rank,
                "crossed",
            )
        self.link.confirm_cuda(step, timeout)
        self._ahead = None

    def peek(self, *, step: int | None = None, timeout: float | None = None) -> Announced:
        """Waits for the next message's header and leaves the message where it is."""
        return self._next(step, timeout)

    def close(self) -> None:
        """Closes this end; the sender's next call fails."""
        self.link.close()

    def _next(self, step: int | None, timeout: float | None) -> Announced:
        self._settle(timeout)
        return self.link.recv_header(step, timeout)

    def _settle(self, timeout: float | None) -> None:
        """Takes what nobody has asked for of the message before."""
        self.confirm(timeout)
        if self._open is not None:
            self._open.wait(timeout)
            self._open = None


class Incoming:
    """A message whose header has come."""

    __slots__ = ("_done", "_link", "_tensors", "note", "values")

    def __init__(self, link: RecvLink, values: dict[str, Any], tensors: list[torch.Tensor], note: Any) -> None:
        self._link = link
        self._tensors = tensors
        self._done: Any = None
        #: Tensors and other values, by name. The tensors' contents are undefined before :meth:`wait`.
        self.values = values
        #: What the sender gave as ``note``.
        self.note = note

    def wait(self, timeout: float | None = None) -> None:
        """Returns when the bytes are in the tensors; for CUDA tensors, when the current stream will find them there."""
        if self._done is None:
            self._start(timeout)
        if self._done is not True:
            self._done.wait_stream(self._current_stream())

    def is_completed(self) -> bool:
        """Whether the bytes are in the tensors."""
        if self._done is None or self._done is True:
            return self._done is True
        return bool(self._done.is_completed())

    def _start(self, timeout: float | None) -> None:
        buffers = [(tensor.data_ptr(), tensor.nbytes) for tensor in self._tensors]
        if self._tensors and self._tensors[0].is_cuda:
            device = self._tensors[0].device
            stream = self._current_stream()
            self._done = self._link.recv_cuda(buffers, stream, device.index, self._tensors, timeout)
        else:
            self._link.recv_payload(buffers, timeout)
            self._done = True

    def _current_stream(self) -> int:
        import torch

        return int(torch.cuda.current_stream(self._tensors[0].device).cuda_stream)


# --- what travels beside the tensors ---

#: Device (None: host memory), other values, note, whether a second message belongs to this one.
_Extra = tuple[str | None, dict[str, Any], Any, bool]
_PLAIN: _Extra = (None, {}, None, False)
_CUDA = pickle.dumps(("cuda", {}, None, False), protocol=4)


def _pack(device: str | None, others: dict[str, Any], note: Any, more: bool) -> bytes:
    if not others and note is None and not more:
        return b"" if device is None else _CUDA
    return pickle.dumps((device, others, note, more), protocol=4)


def _unpack(extra: bytes) -> _Extra:
    if not extra:
        return _PLAIN
    # From the peer's worker, which passed the group's handshake, over a link with the group's ticket.
    unpacked: _Extra = pickle.loads(extra)
    return unpacked


def _split(
    values: Mapping[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors in host memory, tensors on devices, and other values."""
    import torch

    host: dict[str, torch.Tensor] = {}
    device: dict[str, torch.Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            others[name] = value
        elif value.device.type == "cpu":
            host[name] = value
        else:
            device[name] = value
    return host, device, others


def _form(tensors: Sequence[torch.Tensor]) -> list[tuple[str, tuple[int, ...]]]:
    return [(_dtype_name(tensor.dtype), tuple(tensor.shape)) for tensor in tensors]


_names: dict[torch.dtype, str] = {}


def _dtype_name(dtype: torch.dtype) -> str:
    name = _names.get(dtype)
    if name is None:
        name = _names[dtype] = str(dtype).removeprefix("torch.")
    return name


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
