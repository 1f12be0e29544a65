"""Hidden states from one stage to the next: the tensor dicts of vLLM's ``GroupCoordinator`` over links.

vLLM has three forms of it, and each gets the same two links:

==============  ======================================================================================
0.15            ``send_tensor_dict`` and ``recv_tensor_dict``, which return when the buffers are free, or full
0.20, 0.25      ``isend_tensor_dict`` gives handles, and the worker waits for *all* before its next step
0.32            … and the worker waits for all but the first, which is the metadata's
==============  ======================================================================================

So a send gives two handles: one for the metadata, which is done, and one for all tensors. A receive gives a dict that is
filled when its handle is waited for, which the worker does right before the forward pass.

With tensor parallelism each rank sends its share of a tensor to the rank of the same number in the next stage, and the
receivers put the shares together among themselves with vLLM's own all-gather: every byte crosses once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayless.fabric import Incoming, Sending, TensorReceiver, TensorSender


class Done:
    """A handle of something that needs no waiting."""

    def is_completed(self) -> bool:
        """Yes."""
        return True

    def wait(self) -> None:
        """Returns."""


class Coming:
    """A dict that was asked for. Its header is waited for when somebody wants the tensors: until then this stage prepares its
    inputs, beside the stage before, which sends the header when its own kernels have been launched."""

    def __init__(self, receive: Callable[[], tuple[Incoming, list[Callable[[], None]]]]) -> None:
        self._receive = receive
        self._message: Incoming | None = None
        self._joins: list[Callable[[], None]] = []
        #: The dict; empty before :meth:`take`.
        self.values: dict[str, Any] = {}

    def take(self) -> Incoming:
        """Waits for the header and allocates the tensors."""
        if self._message is None:
            self._message, self._joins = self._receive()
            self.values.update(self._message.values)
        return self._message

    def wait(self) -> None:
        """Returns when the bytes are in the tensors; for CUDA tensors, when the current stream will find them there."""
        self.take().wait()

    def is_completed(self) -> bool:
        """Whether the bytes are in the tensors."""
        return self._message is not None and self._message.is_completed()

    def join(self) -> None:
        """After :meth:`wait`: puts shares together."""
        joins, self._joins = self._joins, []
        for join in joins:
            join()
        if joins:
            self.values.update(self.take().values)


class Hop:
    """One rank's links to the stages before and after its own, under the methods of vLLM's pipeline group."""

    def __init__(
        self, group: Any, before: TensorReceiver | None, after: TensorSender | None, step: Callable[[], int]
    ) -> None:
        self._group = group
        self._before = before
        self._after = after
        self._step = step
        #: What must have been found right before anything leaves this stage.
        self.confirm: Callable[[], None] = _nothing
        #: The last dict asked for.
        self._coming: Coming | None = None

    def install(self) -> None:
        """Replaces what this release has of the methods, on the group's coordinator alone."""
        group = self._group
        asynchronous = hasattr(group, "isend_tensor_dict")
        if asynchronous:
            # Its blocking methods are made of these.
            self._isend_of_torch, group.isend_tensor_dict = group.isend_tensor_dict, self.isend
            self._irecv_of_torch, group.irecv_tensor_dict = group.irecv_tensor_dict, self.irecv
        else:
            self._send_of_torch, group.send_tensor_dict = group.send_tensor_dict, self.send
            self._recv_of_torch, group.recv_tensor_dict = group.recv_tensor_dict, self.recv

    def close(self) -> None:
        """Closes both links in order."""
        if self._after is not None:
            self._after.close()
        if self._before is not None:
            self._before.close()

    # --- vLLM 0.20 and newer ---

    def isend(
        self,
        tensor_dict: dict[str, Any],
        dst: int | None = None,
        all_gather_group: Any = None,
        all_gather_tensors: dict[str, bool] | None = None,
    ) -> list[Any]:
        """``GroupCoordinator.isend_tensor_dict``."""
        if not self._is_neighbour(dst, +1):
            return list(self._isend_of_torch(tensor_dict, dst, all_gather_group, all_gather_tensors))
        return [Done(), self._send(tensor_dict, all_gather_group, all_gather_tensors)]

    def irecv(
        self, src: int | None = None, all_gather_group: Any = None, all_gather_tensors: dict[str, bool] | None = None
    ) -> tuple[dict[str, Any] | None, list[Any], list[Callable[[], None]]]:
        """``GroupCoordinator.irecv_tensor_dict``: the dict, handles to wait for, and what to call then."""
        if not self._is_neighbour(src, -1):
            received: tuple[dict[str, Any] | None, list[Any], list[Callable[[], None]]]
            received = self._irecv_of_torch(src, all_gather_group, all_gather_tensors)
            return received
        if self._coming is not None:
            self._coming.take()
        self._coming = coming = Coming(functools.partial(self._receive, all_gather_group, self._step()))
        return coming.values, [coming], [coming.join]

    # --- vLLM 0.15 ---

    def send(
        self,
        tensor_dict: dict[str, Any],
        dst: int | None = None,
        all_gather_group: Any = None,
        all_gather_tensors: dict[str, bool] | None = None,
    ) -> None:
        """``GroupCoordinator.send_tensor_dict``: the caller may write to the tensors afterwards."""
        if not self._is_neighbour(dst, +1):
            self._send_of_torch(tensor_dict, dst, all_gather_group, all_gather_tensors)
        else:
            self._send(tensor_dict, all_gather_group, all_gather_tensors).wait()

    def recv(
        self, src: int | None = None, all_gather_group: Any = None, all_gather_tensors: dict[str, bool] | None = None
    ) -> dict[str, Any] | None:
        """``GroupCoordinator.recv_tensor_dict``: the whole dict."""
        if not self._is_neighbour(src, -1):
            received: dict[str, Any] | None = self._recv_of_torch(src, all_gather_group, all_gather_tensors)
            return received
        message, joins = self._receive(all_gather_group, self._step())
        message.wait()
        for join in joins:
            join()
        return message.values

    # --- both ---

    def _is_neighbour(self, other: int | None, offset: int) -> bool:
        """Whether that stage (``None``: the neighbour) is the one that the link leads to. Between others, which no
        step of vLLM's does, torch stays in charge, at both ends."""
        group = self._group
        neighbour = (group.rank_in_group + offset) % group.world_size
        link = self._after if offset > 0 else self._before
        return link is not None and (other is None or other == neighbour)

    def _send(self, values: dict[str, Any], gather: Any, chosen: dict[str, bool] | None) -> Sending:
        assert self._after is not None
        self.confirm()
        if gather is None or gather.world_size == 1:
            return self._after.isend(values, step=self._step())
        # Name to shape of the tensors of which this is one share.
        whole: dict[str, tuple[int, ...]] = {}
        shares: dict[str, Any] = {}
        for name, value in values.items():
            shares[name] = value
            if hasattr(value, "numel") and value.numel() and _is_shared_out(name, value.numel(), gather, chosen):
                whole[name] = tuple(value.shape)
                shares[name] = value.reshape(gather.world_size, -1)[gather.rank_in_group]
        return self._after.isend(shares, step=self._step(), note=whole or None)

    def _receive(self, gather: Any, step: int) -> tuple[Incoming, list[Callable[[], None]]]:
        assert self._before is not None
        message = self._before.irecv(step=step)
        whole: dict[str, tuple[int, ...]] = message.note or {}

        def join(name: str, shape: tuple[int, ...]) -> Callable[[], None]:
            def run() -> None:
                message.values[name] = gather.all_gather(message.values[name], dim=0).reshape(shape)

            return run

        return message, [join(name, shape) for name, shape in whole.items()]


def _nothing() -> None:
    """Nothing to be confirmed."""


def _is_shared_out(name: str, elements: int, gather: Any, chosen: dict[str, bool] | None) -> bool:
    """As in ``GroupCoordinator._should_use_all_gather``."""
    divisible: bool = elements % gather.world_size == 0
    return divisible if chosen is None else chosen.get(name, divisible)
