"""Sampled tokens from the last stage to the earlier ones, which async scheduling needs before they are at the engine.

vLLM broadcasts them with ``torch.distributed.broadcast``, in functions that differ between releases:

=======================================  ==========================================================================
V1 runner, 0.20 and newer                ``_pp_broadcast_prev_sampled_token_ids`` and ``_pp_receive_prev_…_to_input_batch``;
                                         0.32 waits for the receive at the start of the next step
V2 runner, 0.20                          ``pp_broadcast`` and ``pp_receive``, as imported into its module
V2 runner, 0.25 and newer                ``PPHandler``: on a stream and an NCCL group of its own; what is received at one
                                         step is used ``pp_size`` steps later. 0.32 broadcasts drafts as well
=======================================  ==========================================================================

The functions stay as they are; what changes is where a broadcast leads while one of them runs. On the last stage
the tensors of a call make one message to each earlier stage. There they only note where the tensors are wanted,
and the message is taken when somebody needs it: a host that waited for the last stage inside ``receive`` could
not start its next step, and the pipeline would run one step at a time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from rayless.fabric import Sending, TensorReceiver, TensorSender

V1_SEND = "_pp_broadcast_prev_sampled_token_ids"
V1_RECEIVE = "_pp_receive_prev_sampled_token_ids_to_input_batch"
V2_MODULE = "vllm.v1.worker.gpu.model_runner"


class SiblingGroup:
    """Stands where vLLM would keep the process group that ``PPHandler`` broadcasts on."""


def keep_sibling_group_away() -> None:
    """Lets the pipeline group's ``make_sibling_device_group`` give a :class:`SiblingGroup`, so that no NCCL communicator is made."""
    from vllm.distributed.parallel_state import GroupCoordinator

    original = getattr(GroupCoordinator, "make_sibling_device_group", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def make_sibling_device_group(self: Any, group_desc: str | None = None) -> Any:
        if self.unique_name.startswith("pp") and group_desc == "pp_broadcast":
            return SiblingGroup()
        return original(self, group_desc)

    GroupCoordinator.make_sibling_device_group = make_sibling_device_group


class Tokens:
    """One rank's links for sampled tokens."""

    def __init__(
        self,
        step: Callable[[], int],
        *,
        senders: Sequence[TensorSender] = (),
        receiver: TensorReceiver | None = None,
        ahead: bool = False,
    ) -> None:
        self._step = step
        #: Whether a stream may be given the wait for tokens whose header has not come.
        self._ahead = ahead
        self._senders = senders
        self._receiver = receiver
        self._sending: deque[Sending] = deque()
        self._wanted: deque[Wanted] = deque()
        #: How many tensors were wanted at once when all of them last came as one message.
        self._whole = 0
        #: What the function under way has given to broadcast.
        self._given: list[torch.Tensor] = []
        self._stream: Any = None
        self._device_group: Any = None

    @staticmethod
    def are_sent(runner: Any) -> bool:
        """Whether this runner sends sampled tokens between stages at all; the same on every rank."""
        if getattr(runner, "pp_handler", None) is not None:
            return True
        if type(runner).__module__ == V2_MODULE:
            return hasattr(importlib.import_module(V2_MODULE), "pp_broadcast")
        return hasattr(runner, V1_SEND) and bool(getattr(runner, "use_async_scheduling", False))

    def install(self, group: Any, runner: Any) -> None:
        """Puts the links under the functions that this release and runner have."""
        self._device_group = group.device_group
        handler = getattr(runner, "pp_handler", None)
        if handler is not None:
            self._install_handler(handler)
        elif type(runner).__module__ == V2_MODULE:
            module = importlib.import_module(V2_MODULE)
            self._replace(module, "pp_broadcast", self._sends)
            self._replace(module, "pp_receive", self._receives_now)
        else:
            self._replace(runner, V1_SEND, self._sends)
            self._replace(runner, V1_RECEIVE, self._receives_now)

    def close(self) -> None:
        """Closes the links in order."""
        for sender in self._senders:
            sender.close()
        if self._receiver is not None:
            self._receiver.close()

    def confirm(self) -> None:
        """Before this stage gives anything away: what a stream was given of tokens was theirs."""
        if self._receiver is not None:
            self._receiver.confirm()

    # --- what is put under vLLM's functions ---

    def _install_handler(self, handler: Any) -> None:
        if not isinstance(handler.broadcast_group, SiblingGroup):
            raise RuntimeError(
                "the handler of sampled tokens has a process group of its own already\n"
                "hint: set RAYLESS_PIPELINE=torch, and report this vLLM's version"
            )
        self._replace(handler, "broadcast", self._sends)
        if hasattr(handler, "broadcast_drafts"):
            self._replace(handler, "broadcast_drafts", self._sends)
        receive, consume = handler.receive, handler.get_prev_sampled_outputs

        @functools.wraps(receive)
        def noted(*args: Any, **kwargs: Any) -> Any:
            with self._diverted():
                result = receive(*args, **kwargs)
            wanted = self._take_wanted()
            if wanted is not None:
                handler.queue[-1].rayless_wanted = wanted
            return result

        @functools.wraps(consume)
        def completed(*args: Any, **kwargs: Any) -> Any:
            slot = handler.queue[0] if handler.queue else None
            wanted = getattr(slot, "rayless_wanted", None)
            if slot is not None and wanted is not None:
                wanted.wait(ahead=True)
                # vLLM recorded it when it noted the wish; now it stands behind the bytes.
                slot.event.record(handler.broadcast_stream)
            return consume(*args, **kwargs)

        handler.receive, handler.get_prev_sampled_outputs = noted, completed

    def _sends(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._diverted():
                result = original(*args, **kwargs)
            self._send_given()
            return result

        return run

    def _receives_now(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._diverted():
                result = original(*args, **kwargs)
            wanted = self._take_wanted()
            if wanted is not None:
                wanted.wait()
            return result

        return run

    @staticmethod
    def _replace(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        setattr(owner, name, wrap(getattr(owner, name)))

    # --- broadcasts on their way to us ---

    @contextlib.contextmanager
    def _diverted(self) -> Iterator[None]:
        """Leads broadcasts on the pipeline's group to this object while one function of vLLM's runs."""
        import torch.distributed

        original = torch.distributed.broadcast

        @functools.wraps(original)
        def broadcast(
            tensor: Any, src: int | None = None, group: Any = None, async_op: bool = False, **rest: Any
        ) -> Any:
            if group is self._device_group or isinstance(group, SiblingGroup):
                return self._take(tensor, async_op)
            return original(tensor, src=src, group=group, async_op=async_op, **rest)

        torch.distributed.broadcast = broadcast
        try:
            yield
        finally:
            torch.distributed.broadcast = original

    def _take(self, tensor: torch.Tensor, async_op: bool) -> Wanted | None:
        if tensor.is_cuda:
            import torch

            self._stream = torch.cuda.current_stream(tensor.device)
        self._given.append(tensor)
        # A caller that waits by itself gets something to wait for.
        return self._take_wanted() if async_op and self._receiver is not None else None

    # --- messages ---

    def _send_given(self) -> None:
        given, self._given = self._given, []
        if not given:
            return
        values = {str(number): tensor for number, tensor in enumerate(given)}
        step = self._step()
        with self._on_stream(self._stream):
            self._sending.extend(sender.isend(values, step=step) for sender in self._senders)
        while self._sending and self._sending[0].is_completed():
            self._sending.popleft()

    def _take_wanted(self) -> Wanted | None:
        """The tensors that the function under way wants, as a message to come."""
        given, self._given = self._given, []
        if not given:
            return None
        wanted = Wanted(self, given, self._step(), self._stream)
        self._wanted.append(wanted)
        return wanted

    def _fill(self, wanted: Wanted, ahead: bool) -> None:
        """Takes messages up to the one that ``wanted`` waits for. ``ahead``: a stream may wait in place of this host, which has the
        step's launch to prepare while the last stage has not come to the end of its own."""
        assert self._receiver is not None
        while not wanted.done:
            first = self._wanted.popleft()
            with self._on_stream(first.stream):
                tensors = first.tensors
                if ahead and self._ahead and first.stream is not None and len(tensors) == self._whole:
                    self._receiver.irecv_ahead(tensors, step=first.step).wait()
                    tensors = []
                # vLLM broadcasts drafts in a call of their own, and receives all in one.
                while tensors:
                    count = len(self._receiver.peek(step=first.step).tensors)
                    self._whole = count if count == len(first.tensors) else 0
                    self._receiver.irecv_into(tensors[:count], step=first.step).wait()
                    tensors = tensors[count:]
            first.done = True

    @staticmethod
    @contextlib.contextmanager
    def _on_stream(stream: Any) -> Iterator[None]:
        if stream is None:
            yield
            return
        import torch

        with torch.cuda.stream(stream):
            yield


class Wanted:
    """Tensors that the last stage's next message belongs in; in place of torch's ``Work``."""

    __slots__ = ("_tokens", "done", "step", "stream", "tensors")

    def __init__(self, tokens: Tokens, tensors: list[torch.Tensor], step: int, stream: Any) -> None:
        self._tokens = tokens
        self.tensors = tensors
        self.step = step
        self.stream = stream
        self.done = False

    def wait(self, ahead: bool = False) -> None:
        """Returns when the bytes are in the tensors, or, on a device, when they will be for what comes later on the stream. ``ahead``: the
        latter may be before they are on their way; :meth:`Tokens.confirm` must follow."""
        self._tokens._fill(self, ahead)
        if self.stream is not None:
            import torch

            # Who waits may be on another stream than the one that received.
            torch.cuda.current_stream(self.tensors[0].device).wait_stream(self.stream)

    def is_completed(self) -> bool:
        """Whether they were taken."""
        return self.done
