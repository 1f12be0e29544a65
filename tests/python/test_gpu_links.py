"""Tensors in GPU memory over links, from Python: over the stand-in for the CUDA driver that the Rust tests build, since most machines
that run these tests have no GPU. (What a stream does, and when, is tested in Rust, there and on real GPUs.)"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))
STAND_IN = TARGET / "debug" / "examples" / "libstand_in_for_cuda.so"

PROGRAM = """
import ctypes, gc, time, weakref
from rayless import fabric
from rayless.exceptions import LinkRejectedError

cuda = ctypes.CDLL("libcuda.so.1")
cuda.cuCtxPushCurrent_v2(ctypes.c_size_t(1))
SIZE = 3_000_000

def memory(data=b""):
    address = ctypes.c_uint64()
    assert cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(SIZE)) == 0
    ctypes.memmove(address.value, data, len(data))  # the stand-in's devices are host memory
    return address.value

class Keep:
    pass

data = bytes(range(256)) * (SIZE // 256)
source, target = memory(data), memory()
waiting = ctypes.c_size_t()
assert cuda.cuStreamCreate(ctypes.byref(waiting), 1) == 0
for transport in ("shm", "tcp"):
    sender, receiver = fabric.link_pair(transport)
    assert sender.report()["gpu"] is None
    for step in range(4):
        size = len(data) - step
        keep = Keep()
        gone = weakref.ref(keep)
        sent = sender.isend_cuda([("x", "uint8", (size,), source, size)], b"extra", step, 0, 0, keep)
        del keep
        announced = receiver.recv_header(step, 60)
        assert announced.device and announced.extra == b"extra" and announced.tensors == (("x", "uint8", (size,)),)
        got = receiver.recv_cuda([(target, size)], 0, 0, None)
        got.wait_stream(0)
        sent.wait_stream(0)
        sent.wait(60)
        while not got.is_completed():
            time.sleep(0.001)
        assert sent.is_completed() and ctypes.string_at(target, size) == data[:size]
        ctypes.memset(target, 0, SIZE)
    # Asked for before its header is there, on a stream of its own: only where it is known to come through slots.
    early = receiver.recv_cuda_ahead([(target, 256)], waiting.value, 0, None)
    assert (early is not None) == (transport == "shm")
    if early is not None:
        assert not early.is_completed()
        sender.isend_cuda([("x", "uint8", (256,), source, 256)], None, 4, 0, 0, None)
        receiver.confirm_cuda(4, 60)
        while not early.is_completed():
            time.sleep(0.001)
        assert ctypes.string_at(target, 256) == data[:256]
    for end in (sender, receiver):
        gpu = end.report()["gpu"]
        assert gpu["path"] == ("slots" if transport == "shm" else "staged"), gpu
        assert gpu["host_waits"] is False
        assert (gpu["no_slots"] is None) == (transport == "shm"), gpu
    try:
        sender.isend_cuda([("x", "uint8", (5,), id(data), 5)], None, 9, 0, 0, None)
    except LinkRejectedError as error:
        assert error.kind == "device" and "not in memory of CUDA device 0" in str(error)
    else:
        raise AssertionError("host memory was taken for the GPU's")
    # Into host memory, too, where the payload came through it.
    if transport == "tcp":
        sender.isend_cuda([("x", "uint8", (100,), source, 100)], None, 10, 0, 0, None)
        assert receiver.recv_header(10, 60).device
        buffer = ctypes.create_string_buffer(100)
        receiver.recv_payload([(ctypes.addressof(buffer), 100)], 60)
        assert buffer.raw == data[:100]
    sender.close()
    receiver.close()
    gc.collect()
    assert gone() is None, "what was kept for a message is still kept"
print("done")
"""


@pytest.mark.skipif(
    not STAND_IN.exists(), reason="the stand-in for CUDA is not built (`cargo test -p rayless-fabric` builds it)"
)
def test_gpu_tensors_travel_and_what_was_kept_for_them_is_let_go(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").symlink_to(STAND_IN)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stdout + done.stderr


def test_without_a_driver_a_gpu_tensor_is_refused_with_what_is_missing() -> None:
    program = (
        "from rayless import fabric\n"
        "from rayless.exceptions import LinkRejectedError\n"
        "sender, receiver = fabric.link_pair('shm')\n"
        "try:\n"
        "    sender.isend_cuda([('x', 'uint8', (4,), 4096, 4)], None, 0, 0, 99, None)\n"
        "except LinkRejectedError as error:\n"
        "    print(error)\n"
        "sender.send([], None, 1, 60)\n"
        "assert receiver.recv_header(1, 60).tag == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "libcuda.so.1 cannot be loaded" in done.stdout or "there is no CUDA device 99" in done.stdout
    assert "\nhint: " in done.stdout
