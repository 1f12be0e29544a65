"""The hop between two pipeline stages on GPUs: from the end of one stage's last kernel to the start of the next one's first.

    python benches/gpu_hop.py [--gpu-share 0.5] [--sizes 28672,...] [--repeats 200] [--ways slots,staged,host,tcp] [--out FILE]

Two workers of a real group, on one GPU (``--gpu-share 0.5``) or on two. A kernel of the first ends at a time that it notes itself (the GPU's own
clock, ``globaltimer``), then its stream sends; the second's stream receives and then runs a kernel that notes the time. Both clocks are one
only where both ranks are on one GPU: on two GPUs the figures mean nothing, and the values alone are checked.
Two processes take turns on a GPU, and a change of turns costs more than a hop: start NVIDIA's MPS before
(``nvidia-cuda-mps-control -d``) for them to run side by side; the output says which it was. Needs torch, cupy and a node daemon
that is up (``rayless head --daemon``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import rayless

KERNELS = r"""
extern "C" __global__ void burn(unsigned long long ns, unsigned long long *end) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (now - start < ns);
    *end = now;
}
extern "C" __global__ void mark(unsigned long long *at) {
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    *at = now;
}
"""
BURN_NS = 300_000
WAYS = {
    "slots": {},
    "staged": {"RAYLESS_GPU_HOP": "staged"},
    "host": {"RAYLESS_GPU_HOP": "host"},
    "tcp": {"RAYLESS_TRANSPORT": "tcp"},
}


class Stage:
    """Rank 0 sends, rank 1 receives."""

    def __init__(self) -> None:
        import cupy
        import torch

        self.rank = int(os.environ["RAYLESS_RANK"])
        self.torch = torch
        module = cupy.RawModule(code=KERNELS)
        self.burn, self.mark = module.get_function("burn"), module.get_function("mark")
        self.cupy = cupy
        torch.cuda.init()

    def connect(self) -> None:
        """Opens the link."""
        from rayless import fabric

        if self.rank == 0:
            self.sender = fabric.TensorSender(fabric.send_link(1))
        else:
            self.receiver = fabric.TensorReceiver(fabric.recv_link(0))

    def run(self, size: int, repeats: int) -> list[int]:
        """Times in nanoseconds, one a message: the first kernel's end, or the second's start."""
        torch = self.torch
        times = torch.zeros(repeats, dtype=torch.int64, device="cuda")
        stream = torch.cuda.current_stream()
        external = self.cupy.cuda.ExternalStream(stream.cuda_stream)
        half = size // 2
        hidden = torch.empty(half, dtype=torch.uint8, device="cuda")
        residual = torch.empty(size - half, dtype=torch.uint8, device="cuda")
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for i in range(repeats):
            at = times.data_ptr() + 8 * i
            with external:
                if self.rank == 0:
                    hidden.fill_(i % 251)
                    residual.fill_((i + 1) % 251)
                    self.burn((1,), (1,), (self.cupy.uint64(BURN_NS), self.cupy.uint64(at)))
                    self.sender.isend({"hidden_states": hidden, "residual": residual}, step=i).wait()
                    # The next message waits for this one to be through, as a decode step does.
                    stream.synchronize()
                    time.sleep(0.001 if size < 1 << 24 else 0.03)
                else:
                    message = self.receiver.irecv(step=i)
                    message.wait()
                    self.mark((1,), (1,), (self.cupy.uint64(at),))
                    wrong += (message.values["hidden_states"] != i % 251).sum()
                    wrong += (message.values["residual"] != (i + 1) % 251).sum()
        assert int(wrong) == 0, f"{int(wrong)} bytes are wrong"
        return [int(t) for t in times.tolist()]

    def report(self) -> Any:
        """How the link travelled."""
        return (self.sender if self.rank == 0 else self.receiver).link.report()


def measure(way: str, sizes: list[int], repeats: int, share: float) -> list[dict[str, Any]]:
    """One group's figures."""
    os.environ.pop("RAYLESS_TRANSPORT", None)
    os.environ.update({name: value for name, value in WAYS[way].items() if name == "RAYLESS_TRANSPORT"})
    env = {name: value for name, value in WAYS[way].items() if name != "RAYLESS_TRANSPORT"}
    group = rayless.WorkerGroup.start(Stage, 2, bundles=[{"GPU": share}] * 2, env=env)
    rows = []
    try:
        group.call("connect")
        group.call("run", 4096, 20)  # the ends agree on their way
        for size in sizes:
            count = repeats if size < 1 << 24 else max(10, repeats // 10)
            ends, starts = group.call("run", size, count, timeout=120)
            gaps = sorted((start - end) / 1e3 for end, start in zip(ends, starts, strict=True))[:count]
            rows.append(
                {
                    "way": way,
                    "bytes": size,
                    "n": count,
                    "p50_us": round(statistics.median(gaps), 1),
                    "min_us": round(gaps[0], 1),
                    "p90_us": round(gaps[int(count * 0.9)], 1),
                }
            )
            print(
                f"{way:8} {size:>10} B  p50 {rows[-1]['p50_us']:>8} us  min {rows[-1]['min_us']:>8}  p90 {rows[-1]['p90_us']:>8}",
                flush=True,
            )
        sent = group.call("report")[0]
        print(f"{way:8} {sent['transport']} {sent['gpu']}", flush=True)
        rows[-1]["report"] = sent
    finally:
        group.stop()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="from one stage's last kernel to the next one's first")
    parser.add_argument("--gpu-share", type=float, default=0.5)
    parser.add_argument("--sizes", default="4096,28672,1835008,7340032,234881024")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--ways", default="slots,staged,host,tcp")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    served = subprocess.run(["pgrep", "-x", "nvidia-cuda-mps"], capture_output=True, check=False).returncode == 0
    print(f"MPS: {'yes' if served else 'no'}; gap from kernel end to kernel start", flush=True)
    rows = []
    for way in arguments.ways.split(","):
        try:
            rows += measure(way, sizes, arguments.repeats, arguments.gpu_share)
        except rayless.exceptions.RayError as error:
            print(f"{way}: {error}", file=sys.stderr, flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"mps": served, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
