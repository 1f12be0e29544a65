"""torch tensors over a link, both ends in this process. (Here because this is where torch is.)"""

from __future__ import annotations

import pytest
import torch

from rayless import fabric
from rayless.exceptions import LinkLostError, LinkRejectedError

CARRIED = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.fixture(params=["shm", "tcp"])
def ends(request: pytest.FixtureRequest) -> tuple[fabric.TensorSender, fabric.TensorReceiver]:
    sender, receiver = fabric.link_pair(request.param, verify=True)
    return fabric.TensorSender(sender), fabric.TensorReceiver(receiver)


Ends = tuple[fabric.TensorSender, fabric.TensorReceiver]


@pytest.mark.parametrize("dtype", CARRIED, ids=str)
def test_every_dtype_comes_bit_for_bit(ends: Ends, dtype: torch.dtype) -> None:
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * size,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(2, 3)
    ends[0].send({"x": tensor})
    got = ends[1].recv()["x"]
    assert (got.dtype, got.shape) == (dtype, tensor.shape)
    assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


def test_other_values_and_a_note_come_along(ends: Ends) -> None:
    values = {"x": torch.ones(2), "scale": 0.5, "nothing": torch.empty(0, 7), "names": ["a"]}
    ends[0].send(values, step=3, note={"x": (4,)})
    message = ends[1].irecv(step=3)
    assert message.note == {"x": (4,)}
    message.wait()
    assert message.is_completed()
    assert set(message.values) == set(values)
    assert torch.equal(message.values["x"], torch.ones(2))
    assert message.values["nothing"].shape == (0, 7)
    assert (message.values["scale"], message.values["names"]) == (0.5, ["a"])


def test_a_message_that_nobody_waited_for_is_taken_before_the_next(ends: Ends) -> None:
    for step in range(3):
        ends[0].isend({"x": torch.full((5,), step)}, step=step)
    first, second = ends[1].irecv(step=0), ends[1].irecv(step=1)
    assert first.is_completed()
    assert not second.is_completed()
    assert int(first.values["x"][0]) == 0
    assert int(ends[1].recv(step=2)["x"][0]) == 2
    assert int(second.values["x"][0]) == 1


def test_a_tensor_may_be_written_again_when_its_handle_is_done() -> None:
    sender, receiver = fabric.link_pair("tcp")
    large = torch.zeros(32 << 20, dtype=torch.uint8)
    handle = fabric.TensorSender(sender).isend({"x": large})
    assert not handle.is_completed()
    message = fabric.TensorReceiver(receiver).irecv()
    message.wait()
    handle.wait()
    large.fill_(1)
    assert int(message.values["x"].max()) == 0


def test_views_that_are_not_contiguous_are_refused_with_their_strides(ends: Ends) -> None:
    with pytest.raises(
        LinkRejectedError, match=r"link 0->1.0 .*`x` of shape \(3, 2\) is not contiguous \(strides \(1, 3\)\)"
    ):
        ends[0].isend({"x": torch.ones(2, 3).T})
    with pytest.raises(LinkRejectedError, match="qint8"):
        ends[0].isend({"x": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)})
    with pytest.raises(LinkRejectedError, match="tensors on meta"):
        ends[0].isend({"x": torch.ones(2, device="meta")})
    conjugate = torch.tensor([1 + 2j]).conj()
    ends[0].send({"x": conjugate})
    assert torch.equal(ends[1].recv()["x"], conjugate), "what it shows, not what its memory holds"


def test_buffers_of_ones_own_must_fit(ends: Ends) -> None:
    ends[0].send({"0": torch.arange(4), "1": torch.ones(2)})
    for wrong in ([torch.zeros(4)], [torch.zeros(4, dtype=torch.int64), torch.ones(3)]):
        with pytest.raises(LinkRejectedError, match="but buffers for"):
            ends[1].irecv_into(wrong)
    assert len(ends[1].peek().tensors) == 2
    fitting = [torch.zeros(4, dtype=torch.int64), torch.zeros(2)]
    ends[1].irecv_into(fitting).wait()
    assert torch.equal(fitting[0], torch.arange(4))
    assert torch.equal(fitting[1], torch.ones(2))


def test_another_steps_tensors_are_never_given(ends: Ends) -> None:
    ends[0].send({"x": torch.ones(1)}, step=1)
    with pytest.raises(LinkLostError, match="rank 1 is at step 2, but rank 0 sent step 1"):
        ends[1].irecv(step=2)
