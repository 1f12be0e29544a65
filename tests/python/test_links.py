"""Links as Python has them: both ends in this process, tensors as plain memory. (torch's part is in tests/vllm.)"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import weakref

import pytest

from rayless import fabric
from rayless.exceptions import (
    LinkClosedError,
    LinkError,
    LinkLostError,
    LinkRejectedError,
    LinkTimeoutError,
    LinkUnavailableError,
    RayError,
)

TRANSPORTS = ("tcp", "shm")


class Memory:
    """Bytes with an address."""

    def __init__(self, data: bytes | int) -> None:
        self.raw = (
            ctypes.create_string_buffer(data, len(data))
            if isinstance(data, bytes)
            else ctypes.create_string_buffer(data)
        )
        self.address = ctypes.addressof(self.raw)
        self.size = ctypes.sizeof(self.raw)

    def tensor(self, name: str = "x", dtype: str = "uint8", shape: tuple[int, ...] | None = None):  # type: ignore[no-untyped-def]
        return (name, dtype, (self.size,) if shape is None else shape, self.address, self.size)

    @property
    def place(self) -> tuple[int, int]:
        return self.address, self.size

    @property
    def data(self) -> bytes:
        return self.raw.raw


def received(link: fabric.RecvLink, step: int | None = None) -> tuple[fabric.Announced, list[bytes]]:  # type: ignore[name-defined]
    announced = link.recv_header(step, 10)
    sizes = {"uint8": 1, "bfloat16": 2, "float32": 4}
    rooms = []
    for _, dtype, shape in announced.tensors:
        count = sizes[dtype]
        for dimension in shape:
            count *= dimension
        rooms.append(Memory(count))
    link.recv_payload([room.place for room in rooms], 10)
    return announced, [room.data for room in rooms]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_message_comes_with_its_names_shapes_and_step(transport: str) -> None:
    sender, receiver = fabric.link_pair(transport, from_rank=3, to_rank=4, channel=7)
    hidden, residual = Memory(b"h" * 24), Memory(b"r" * 4)
    sender.send([hidden.tensor("hidden", "bfloat16", (3, 4)), residual.tensor("residual", "float32", ())], b"note", 9)
    announced, data = received(receiver, 9)
    assert (announced.sequence, announced.tag, announced.extra) == (0, 9, b"note")
    assert announced.tensors == (("hidden", "bfloat16", (3, 4)), ("residual", "float32", ()))
    assert data == [hidden.data, residual.data]
    report = receiver.report()
    assert (report["from"], report["to"], report["channel"], report["transport"]) == (3, 4, 7, transport)
    assert (report["messages"], report["bytes"]) == (1, 28)
    assert sender.report()["bytes"] == 28


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_does_not_fit_is_sent_by_the_queue_in_order(transport: str) -> None:
    sender, receiver = fabric.link_pair(transport)
    large = [Memory(bytes([number]) * (32 << 20)) for number in range(3)]
    handles = [sender.isend([one.tensor()], None, number, one) for number, one in enumerate(large)]
    assert sender.pending() > 0
    with pytest.raises(LinkTimeoutError, match="has not left within 0"):
        handles[-1].wait(0)
    for number in range(3):
        announced, [data] = received(receiver, number)
        assert announced.sequence == number
        assert data == large[number].data
    for handle in handles:
        handle.wait(10)
        assert handle.is_completed()
    assert sender.pending() == 0


def test_what_is_sent_is_kept_until_it_has_left() -> None:
    class Owner:
        pass

    sender, receiver = fabric.link_pair("shm")
    memory, owner = Memory(b"x" * (32 << 20)), Owner()
    watch = weakref.ref(owner)
    handle = sender.isend([memory.tensor()], None, 0, owner)
    del owner
    gc.collect()
    assert watch() is not None, "the message has not left"
    received(receiver)
    handle.wait(10)
    # Another thread let it go; what it holds is dropped with the next look that Python takes.
    sender.report()
    gc.collect()
    assert watch() is None


def test_mistakes_are_told_before_anything_is_sent_and_cost_nothing() -> None:
    sender, receiver = fabric.link_pair("tcp", max_message=100)
    good = Memory(b"good")
    mistakes = [
        (good.tensor("q", "qint8"), "dtype", "`qint8` is not a dtype"),
        (Memory(101).tensor("big"), "too large", "over the limit of 100 bytes"),
        (good.tensor("short", "uint8", (5,)), "mismatch", "has 5 bytes, but its buffer has 4"),
    ]
    for tensor, kind, text in mistakes:
        for send in (sender.send, sender.isend):
            with pytest.raises(LinkRejectedError, match=text) as caught:
                send([tensor])
            assert isinstance(caught.value, ValueError)
            assert (caught.value.kind, caught.value.from_rank, caught.value.to_rank) == (kind, 0, 1)
            assert str(caught.value).startswith("link 0->1.0 of group ")
            assert "\nhint: " in str(caught.value)
    with pytest.raises(LinkRejectedError, match="before its header"):
        receiver.recv_payload([good.place])
    sender.send([good.tensor()])
    receiver.recv_header()
    with pytest.raises(LinkRejectedError, match="has 1 tensors, but 0 buffers"):
        receiver.recv_payload([])
    with pytest.raises(LinkRejectedError, match="has 4 bytes, but its buffer has 3"):
        receiver.recv_payload([Memory(3).place])
    assert received(receiver)[1] == [b"good"]


def test_a_crossed_step_is_an_error_at_both_ends_and_never_a_tensor() -> None:
    sender, receiver = fabric.link_pair("tcp")
    sender.send([Memory(b"old").tensor()], None, 41)
    with pytest.raises(LinkLostError, match="rank 1 is at step 42, but rank 0 sent step 41") as caught:
        receiver.recv_header(42, 10)
    assert caught.value.kind == "crossed"
    with pytest.raises(LinkLostError, match="at step 42"):
        receiver.recv_header(None, 10)
    with pytest.raises(LinkLostError, match="rank 1 is at step 42") as caught:
        while True:  # the news has to travel
            sender.send([Memory(1 << 16).tensor()], None, 42, 10)
    assert isinstance(caught.value, ConnectionError)
    assert isinstance(caught.value, LinkError)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_wait_that_ends_early_loses_nothing(transport: str) -> None:
    sender, receiver = fabric.link_pair(transport)
    for timeout in (0, 0.01):
        with pytest.raises(LinkTimeoutError, match="waiting for message 0 timed out") as caught:
            receiver.recv_header(None, timeout)
        assert isinstance(caught.value, TimeoutError)
    sender.send([Memory(b"late").tensor()])
    assert received(receiver)[1] == [b"late"]
    with pytest.raises(ValueError, match="no time to wait"):
        receiver.recv_header(None, -1)


def test_ctrl_c_ends_a_wait_and_not_the_link() -> None:
    sender, receiver = fabric.link_pair("shm")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ring = threading.Timer(0.05, signal.raise_signal, (signal.SIGINT,))
        ring.start()
        with pytest.raises(KeyboardInterrupt):
            receiver.recv_header(None, 60)
        ring.join()
    finally:
        signal.signal(signal.SIGINT, before)
    sender.send([Memory(b"still").tensor()])
    assert received(receiver)[1] == [b"still"]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_close_is_no_loss_and_final(transport: str) -> None:
    sender, receiver = fabric.link_pair(transport)
    sender.isend([Memory(b"last").tensor()])
    sender.close()
    sender.close()
    with pytest.raises(LinkClosedError, match="closed"):
        sender.send([])
    assert received(receiver)[1] == [b"last"]
    with pytest.raises(LinkClosedError, match="closed after 1 messages"):
        receiver.recv_header(None, 10)


def test_closing_ends_a_wait_of_another_thread() -> None:
    _sender, receiver = fabric.link_pair("tcp")
    seen: list[BaseException] = []

    def wait() -> None:
        try:
            receiver.recv_header()
        except LinkClosedError as error:
            seen.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while receiver.report()["phase"] != "awaiting header":
        pass
    receiver.close()
    thread.join(10)
    assert len(seen) == 1


def test_a_receiver_that_goes_away_is_news_to_the_sender() -> None:
    sender, receiver = fabric.link_pair("tcp")
    del receiver
    gc.collect()
    memory = Memory(1 << 20)
    with pytest.raises(LinkLostError, match="the receiver closed its end"):
        while True:
            sender.isend([memory.tensor()], None, 0, memory).wait(10)


def test_only_workers_have_links_to_other_ranks() -> None:
    with pytest.raises(RayError, match="no worker of a group"):
        fabric.send_link(1)
    with pytest.raises(ValueError, match="`carrier pigeon` is no transport"):
        fabric.link_pair("carrier pigeon")
    with pytest.raises(LinkUnavailableError):
        fabric.link_pair("rdma")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_forked_child_neither_uses_nor_breaks_its_parents_links(transport: str) -> None:
    sender, receiver = fabric.link_pair(transport)
    large = Memory(b"l" * (32 << 20))
    # Both ends' threads run, and a message is on its way.
    handle = sender.isend([large.tensor()], None, 0, large)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        calls = (
            lambda: sender.send([Memory(b"x").tensor()]),
            lambda: receiver.recv_header(None, 10),
            lambda: handle.wait(10),
        )
        for call in calls:
            try:
                call()
            except LinkLostError as error:
                said.append("forked from" in str(error))
        # Its own links work, and are watched.
        own, other = fabric.link_pair(transport)
        own.send([Memory(b"child").tensor()])
        said.append(received(other)[1] == [b"child"])
        del sender, receiver, handle, own, other
        gc.collect()
        os.write(write, repr(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == repr([True] * 4)
    assert os.waitpid(child, 0)[1] == 0
    assert received(receiver, 0)[1] == [large.data]
    handle.wait(10)
    sender.send([Memory(b"after").tensor()])
    assert received(receiver)[1] == [b"after"]
    sender.close()
    with pytest.raises(LinkClosedError):
        receiver.recv_header(None, 10)


def test_a_peers_end_is_seen_although_a_forked_child_lives_on() -> None:
    for transport in TRANSPORTS:
        sender, receiver = fabric.link_pair(transport)
        hold, release = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(release)
            os.read(hold, 1)
            os._exit(0)
        os.close(hold)
        # An end without a goodbye: a message that is given up in the middle.
        memory = Memory(b"x" * (32 << 20))
        sender.isend([memory.tensor()], None, 0, memory)
        del sender
        gc.collect()
        with pytest.raises(LinkLostError):
            received(receiver)
        os.close(release)
        assert os.waitpid(child, 0)[1] == 0


def test_a_long_payload_over_shared_memory_takes_one_copy_and_says_so() -> None:
    sender, receiver = fabric.link_pair("shm")
    assert (sender.report()["mode"], receiver.report()["mode"]) == ("cma", "cma")
    tcp = fabric.link_pair("tcp")
    assert [end.report()["mode"] for end in tcp] == [None, None]
    one, two = Memory(os.urandom(3 << 20)), Memory(os.urandom(5 << 20))
    handle = sender.isend([one.tensor("one"), two.tensor("two")], None, 0, (one, two))
    assert received(receiver, 0)[1] == [one.data, two.data]
    handle.wait(10)
