"""Sampled tokens over links, with the installed vLLM's own handler; its streams are stand-ins, since there is no GPU here."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from rayless import fabric
from rayless.exceptions import LinkLostError
from rayless.vllm.pipeline.hop import Hop
from rayless.vllm.pipeline.tokens import SiblingGroup, Tokens


def load() -> Any:
    """The installed release's module, or the file that RAYLESS_PP_UTILS names (`other_releases.py`)."""
    path = os.environ.get("RAYLESS_PP_UTILS")
    if path is None:
        return pytest.importorskip("vllm.v1.worker.gpu.pp_utils")
    from vllm.v1.worker.gpu import buffer_utils

    if not hasattr(buffer_utils, "async_copy_to_gpu"):  # what 0.25 calls it
        buffer_utils.async_copy_to_gpu = lambda array, device: torch.as_tensor(array)
    spec = importlib.util.spec_from_file_location("pp_utils_of_another_release", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


pp_utils = load()
if not hasattr(pp_utils, "PPHandler"):
    pytest.skip("this vLLM has no PPHandler", allow_module_level=True)

STAGES, REQUESTS, SPECULATED = 2, 3, 2


class Stream:
    """Everything on it has happened already."""

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None:
        assert event.recorded, "nobody waits for what was never recorded"

    def record_event(self) -> Event:
        return Event()

    def synchronize(self) -> None: ...


class Event:
    def __init__(self) -> None:
        self.recorded = 1

    def record(self, stream: Stream) -> None:
        self.recorded += 1


class Group:
    """What the handler asks of the pipeline's group."""

    world_size = STAGES
    last_rank = STAGES - 1
    device_group = object()

    def __init__(self, rank: int) -> None:
        self.is_last_rank = rank == STAGES - 1

    def make_sibling_device_group(self, group_desc: str | None = None) -> SiblingGroup:
        return SiblingGroup()


class Rank:
    """A handler over its end of the link. ``step`` is what the group's call number is in a worker."""

    def __init__(self, rank: int, speculated: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step = 0
        group = Group(rank)
        self._patch = monkeypatch
        self._group = group
        with self._here():
            self.handler = pp_utils.PPHandler(8, speculated, torch.device("cpu"))

    def install(self, **ends: Any) -> None:
        runner = types.SimpleNamespace(pp_handler=self.handler)
        assert Tokens.are_sent(runner)
        self.tokens = Tokens(lambda: self.step, ahead=True, **ends)
        self.tokens.install(self._group, runner)

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        self._patch.setattr(pp_utils, "get_pp_group", lambda: self._group)
        yield

    def call(self, name: str, *args: Any) -> Any:
        with self._here():
            return getattr(self.handler, name)(*args)


@pytest.fixture(params=[0, SPECULATED], ids=["plain", "drafts"])
def speculated(request: pytest.FixtureRequest) -> int:
    if request.param and not hasattr(pp_utils.PPHandler, "broadcast_drafts"):
        pytest.skip("this vLLM broadcasts no drafts")
    return int(request.param)


@pytest.fixture
def ranks(speculated: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Rank, Rank]:
    """The first stage and the last, joined."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    first, last = (Rank(rank, speculated, monkeypatch) for rank in (0, STAGES - 1))
    sender, receiver = fabric.link_pair("shm", from_rank=1, to_rank=0, channel=1)
    first.install(receiver=fabric.TensorReceiver(receiver))
    last.install(senders=[fabric.TensorSender(sender)])
    return first, last


def batch(step: int, *, decoding: bool = True) -> Any:
    """Three requests in their decode phase, or in a chunk of prefill that samples nothing."""
    length = 4 if decoding else 100
    return types.SimpleNamespace(
        num_reqs=REQUESTS,
        num_computed_tokens_np=numpy.full(REQUESTS, 10 if decoding else 0),
        num_scheduled_tokens=numpy.full(REQUESTS, 1),
        prefill_len_np=numpy.full(REQUESTS, length),
        max_seq_len_np=numpy.full(REQUESTS, 200),
        is_prefilling_np=numpy.full(REQUESTS, not decoding),
        idx_mapping=torch.arange(REQUESTS),
        idx_mapping_np=numpy.arange(REQUESTS),
    )


def sampled(step: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.arange(REQUESTS * width).reshape(REQUESTS, width) + 1000 * step
    counts = torch.full((REQUESTS,), step, dtype=torch.int32)
    return tokens, counts, counts + 1


def send(last: Rank, step: int, speculated: int, work: Any) -> None:
    last.step = step
    last.call("broadcast", *sampled(step, speculated + 1), work)
    if speculated:
        last.call("broadcast_drafts", torch.arange(8 * speculated).reshape(8, speculated) + step, work)


def consume(first: Rank, speculated: int) -> tuple[Any, Any]:
    """What the first stage has of two steps ago, and the drafts where there are any."""
    if not speculated:
        return first.call("get_prev_sampled_outputs"), None
    drafts = torch.zeros(8, speculated, dtype=torch.int64)
    return first.call("get_prev_sampled_outputs", drafts), drafts


def test_tokens_of_a_step_are_there_two_steps_later(ranks: tuple[Rank, Rank], speculated: int) -> None:
    """The first stage never waits in `receive`: here the last stage sends after the first has gone on."""
    first, last = ranks
    for step in range(20):
        outputs, drafts = consume(first, speculated)
        if step < STAGES:
            assert outputs is None
        else:
            tokens, counts, rejected = sampled(step - STAGES, speculated + 1)
            assert torch.equal(outputs["sampled_tokens"], tokens)
            assert torch.equal(outputs["num_sampled"], counts)
            assert torch.equal(outputs["num_rejected"], rejected)
            if drafts is not None:
                expected = torch.arange(REQUESTS * speculated).reshape(REQUESTS, speculated) + step - STAGES
                assert torch.equal(drafts[:REQUESTS], expected)
        first.step = step
        assert first.call("receive", batch(step))
        send(last, step, speculated, batch(step))


def test_steps_that_sample_nothing_send_nothing(ranks: tuple[Rank, Rank], speculated: int) -> None:
    first, last = ranks
    seen = []
    for step in range(10):
        outputs, _ = consume(first, speculated)
        seen.append(None if outputs is None else int(outputs["num_sampled"][0]))
        first.step = step
        work = batch(step, decoding=step % 3 == 0)
        first.call("receive", work)
        send(last, step, speculated, work)
    assert seen == [None, None, 0, None, None, 3, None, None, 6, None]


def test_tokens_of_requests_that_ended_meanwhile_are_taken_and_dropped(
    ranks: tuple[Rank, Rank], speculated: int
) -> None:
    first, last = ranks
    for step in range(2):
        consume(first, speculated)
        first.step = step
        first.call("receive", batch(step))
        send(last, step, speculated, batch(step))
        if step == 0:
            for request in range(REQUESTS):
                first.call("on_req_idx_freed", request)
    assert consume(first, speculated)[0] is None, "all of them ended"
    outputs, _ = consume(first, speculated)
    assert int(outputs["num_sampled"][0]) == 1, "the next step's own tokens"


def test_tokens_of_another_step_are_never_used(ranks: tuple[Rank, Rank], speculated: int) -> None:
    first, last = ranks
    for _ in range(STAGES):
        consume(first, speculated)
        first.step = 7
        first.call("receive", batch(7))
    send(last, 8, speculated, batch(8))
    with pytest.raises(LinkLostError, match="rank 0 is at step 7, but rank 1 sent step 8"):
        consume(first, speculated)


def test_once_their_form_is_known_a_stream_waits_for_tokens_and_the_host_only_before_it_sends(
    ranks: tuple[Rank, Rank], speculated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = ranks
    first.tokens._stream = Stream()  # as for tensors of a GPU
    happened: list[str] = []

    def spy(name: str) -> None:
        original = getattr(fabric.TensorReceiver, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            happened.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(fabric.TensorReceiver, name, run)

    spy("irecv_ahead")
    spy("peek")
    hop = Hop(types.SimpleNamespace(rank_in_group=0, world_size=STAGES), None, Sender(happened), lambda: first.step)
    hop.confirm = first.tokens.confirm
    spy("confirm")
    for step in range(6):
        happened.clear()
        outputs, _ = consume(first, speculated)
        # Drafts come in a message of their own; how many messages there are the host must see.
        form = ["peek"] if step == STAGES else ["irecv_ahead"]
        asked = [name for name in happened if name != "confirm"]
        assert asked == ([] if outputs is None else ["peek", "peek"] if speculated else form)
        happened.clear()
        hop._send({}, None, None)
        assert happened == ["confirm", "sent"]
        first.step = step
        first.call("receive", batch(step))
        send(last, step, speculated, batch(step))


class Sender:
    """The link to the next stage."""

    def __init__(self, happened: list[str]) -> None:
        self._happened = happened

    def isend(self, values: Any, *, step: int) -> None:
        self._happened.append("sent")


def test_other_broadcasts_stay_where_they_were(ranks: tuple[Rank, Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only while a function of the handler runs, and only on its group, does a broadcast lead to a link."""
    original = torch.distributed.broadcast
    send(ranks[1], 0, 0, batch(0))
    assert torch.distributed.broadcast is original
    elsewhere: list[Any] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, **rest: elsewhere.append(rest["group"]))
    tokens = Tokens(lambda: 0)
    with tokens._diverted():
        torch.distributed.broadcast(torch.zeros(1), src=0, group="tensor parallel")
    assert elsewhere == ["tensor parallel"]
