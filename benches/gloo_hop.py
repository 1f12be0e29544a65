"""A hop over gloo as vLLM's stages make it: two messages of metadata and one per tensor; half of a round trip.

python benches/gloo_hop.py RANK ADDRESS PORT BYTES SECONDS      (rank 0 measures, rank 1 answers)
"""

from __future__ import annotations

import datetime
import json
import pickle
import sys
import time

import torch
import torch.distributed as dist

Described = list[tuple[str, torch.Size, torch.dtype]]


def send(tensors: dict[str, torch.Tensor], to: int) -> None:
    """As GroupCoordinator.send_tensor_dict: `send_object` (size, pickle), then the tensors."""
    described: Described = [(name, tensor.size(), tensor.dtype) for name, tensor in tensors.items()]
    data = torch.frombuffer(bytearray(pickle.dumps(described)), dtype=torch.uint8)
    dist.send(torch.tensor([data.numel()], dtype=torch.long), to)
    dist.send(data, to)
    for tensor in tensors.values():
        dist.send(tensor, to)


def receive(source: int) -> dict[str, torch.Tensor]:
    """As GroupCoordinator.recv_tensor_dict."""
    size = torch.empty(1, dtype=torch.long)
    dist.recv(size, source)
    data = torch.empty(int(size.item()), dtype=torch.uint8)
    dist.recv(data, source)
    described: Described = pickle.loads(data.numpy().tobytes())
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in described}
    for tensor in tensors.values():
        dist.recv(tensor, source)
    return tensors


def main() -> None:
    """Runs one of the two ranks."""
    rank, address, port, size, seconds = (
        int(sys.argv[1]),
        sys.argv[2],
        sys.argv[3],
        int(sys.argv[4]),
        float(sys.argv[5]),
    )
    dist.init_process_group(
        "gloo", f"tcp://{address}:{port}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120)
    )
    half = {name: torch.ones(size // 4, dtype=torch.bfloat16) for name in ("hidden_states", "residual")}
    if rank == 1:
        while True:
            got = receive(0)
            send(got, 0)
            if not got["hidden_states"][0].item():
                break
    else:
        times: list[float] = []
        begin = time.perf_counter()
        last = False
        while not last:
            last = time.perf_counter() - begin > seconds and len(times) >= 20
            if last:
                half["hidden_states"][0] = 0
            start = time.perf_counter()
            send(half, 1)
            receive(1)
            times.append((time.perf_counter() - start) / 2 * 1e6)
        times = sorted(times[len(times) // 10 :])
        print(json.dumps({"p50_us": times[len(times) // 2], "p99_us": times[len(times) * 99 // 100]}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
