"""The links of a pipeline as torch has them where NCCL cannot be used: through host memory and gloo.

vLLM imports this module in every worker (``worker_extension_cls``); with BENCH_GLOO_LINKS=1 it puts these links in the place of rayless's. What
lies above, and when it asks for a message, stays the same, so that a difference in a measurement is the links' alone. As in
vLLM's own ``send_object`` and ``isend_tensor_dict``, a message is the length of its description, the description, and one send per tensor.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist


class GlooLinks:
    """What vLLM asks for: a class to add to its worker's. It adds nothing."""


class Announced:
    """The description of a message."""

    def __init__(self, tensors: list[tuple[str, torch.dtype, tuple[int, ...], str]], note: Any) -> None:
        self.tensors = tensors
        self.note = note


class Sent:
    """A message under way; holds the copies that it sends."""

    def __init__(self, works: list[Any], kept: list[torch.Tensor]) -> None:
        self._works = works
        self._kept = kept

    def wait(self, timeout: float | None = None) -> None:
        """Returns when the bytes have been handed over."""
        for work in self._works:
            work.wait()

    def is_completed(self) -> bool:
        """Whether they have been."""
        return all(work.is_completed() for work in self._works)


class Sender:
    """In place of ``fabric.TensorSender``."""

    def __init__(self, end: tuple[int, int]) -> None:
        self._to, self._tag = end

    def isend(self, values: Mapping[str, torch.Tensor], *, step: int = 0, note: Any = None) -> Sent:
        """Waits for the device, copies to the host and sends from there."""
        staged = {name: tensor.cpu() for name, tensor in values.items()}
        form = [(name, tensor.dtype, tuple(tensor.shape), tensor.device.type) for name, tensor in values.items()]
        described = torch.frombuffer(bytearray(pickle.dumps((form, note))), dtype=torch.uint8)
        length = torch.tensor([described.numel()], dtype=torch.long)
        kept = [length, described, *staged.values()]
        return Sent([self._send(tensor) for tensor in kept], kept)

    def _send(self, tensor: torch.Tensor) -> Any:
        return dist.isend(tensor, dst=_ranks()[self._to], group=_group(), tag=self._tag)

    def close(self) -> None:
        """Nothing is open."""


class Message:
    """In place of ``fabric.Incoming``."""

    def __init__(self, receiver: Receiver, announced: Announced, targets: list[torch.Tensor]) -> None:
        self.values = {form[0]: target for form, target in zip(announced.tensors, targets, strict=True)}
        self.note = announced.note
        self._targets = targets
        self._staged = [torch.empty(shape, dtype=dtype) for _, dtype, shape, _ in announced.tensors]
        self._works = [receiver.receive(tensor) for tensor in self._staged]
        self._done = False

    def wait(self, timeout: float | None = None) -> None:
        """Waits on the host, then copies to the device."""
        if not self._done:
            for work, staged, target in zip(self._works, self._staged, self._targets, strict=True):
                work.wait()
                target.copy_(staged)
            self._done = True

    def is_completed(self) -> bool:
        """Whether the bytes are in the tensors."""
        return self._done


class Receiver:
    """In place of ``fabric.TensorReceiver``."""

    def __init__(self, end: tuple[int, int]) -> None:
        self._from, self._tag = end
        self._announced: Announced | None = None
        self._open: Message | None = None

    def receive(self, tensor: torch.Tensor) -> Any:
        """One tensor of host memory."""
        return dist.irecv(tensor, src=_ranks()[self._from], group=_group(), tag=self._tag)

    def peek(self, *, step: int | None = None, timeout: float | None = None) -> Announced:
        """Waits for the description of the next message."""
        if self._open is not None:
            self._open.wait()
            self._open = None
        if self._announced is None:
            length = torch.empty(1, dtype=torch.long)
            self.receive(length).wait()
            described = torch.empty(int(length), dtype=torch.uint8)
            self.receive(described).wait()
            self._announced = Announced(*pickle.loads(described.numpy().tobytes()))
        return self._announced

    def irecv(self, *, step: int | None = None, timeout: float | None = None) -> Message:
        """The next message, into new tensors."""
        announced = self.peek()
        return self._take([torch.empty(shape, dtype=dtype, device=kind) for _, dtype, shape, kind in announced.tensors])

    def irecv_into(
        self, tensors: Sequence[torch.Tensor], *, step: int | None = None, timeout: float | None = None
    ) -> Message:
        """The next message, into tensors that are there."""
        self.peek()
        return self._take(list(tensors))

    def _take(self, targets: list[torch.Tensor]) -> Message:
        announced, self._announced = self._announced, None
        assert announced is not None
        self._open = Message(self, announced, targets)
        return self._open

    def confirm(self, timeout: float | None = None) -> None:
        """Nothing is received ahead."""

    def close(self) -> None:
        """Nothing is open."""


def _group() -> Any:
    from vllm.distributed.parallel_state import get_pp_group

    return get_pp_group().cpu_group


def _ranks() -> list[int]:
    from vllm.distributed.parallel_state import get_pp_group

    ranks: list[int] = get_pp_group().ranks
    return ranks


def _install() -> None:
    from rayless import fabric

    def end(rank: int, channel: int = 0, *, timeout: float = 0) -> tuple[int, int]:
        return rank, channel

    fabric.send_link = fabric.recv_link = end  # type: ignore[assignment]
    fabric.TensorSender, fabric.TensorReceiver = Sender, Receiver  # type: ignore[misc,assignment]


if os.environ.get("BENCH_GLOO_LINKS") == "1":
    _install()
