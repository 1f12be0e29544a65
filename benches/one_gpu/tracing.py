"""Observers inside a worker, put there by ``collective_rpc``: marks on the host's and the GPU's clock, torch's profiler, cProfile.

A mark on the GPU is a kernel of one thread that notes ``globaltimer``: one clock for all ranks on one GPU. A mark on the host is CLOCK_MONOTONIC: one
clock for all processes. ``offset`` is what is to be added to the first for the second.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

CAPACITY = 1 << 16
SOURCE = r"""
extern "C" __global__ void mark(unsigned long long *at) {
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    *at = now;
}
"""
#: What `start` put into this process.
current: Any = None


class Trace:
    """Marks of one rank."""

    def __init__(self, worker: Any) -> None:
        import torch

        self._torch = torch
        self._restore: list[tuple[Any, str, Any, bool]] = []
        self.host_marks: list[tuple[str, int]] = []
        self.gpu_marks: list[str] = []
        self._times: Any = None
        self.offset = 0
        if torch.cuda.is_available():
            import cupy

            self._cupy = cupy
            self._mark = cupy.RawModule(code=SOURCE).get_function("mark")
            self._times = torch.zeros(CAPACITY, dtype=torch.int64, device="cuda")
            torch.cuda.synchronize()
            self.offset = self._calibrate()
        self._put_in(worker)

    def host(self, name: str) -> None:
        """A mark on the host's clock."""
        self.host_marks.append((name, time.monotonic_ns()))

    def gpu(self, name: str) -> None:
        """A mark on the GPU's clock, when the current stream comes to it."""
        if self._times is None or len(self.gpu_marks) >= CAPACITY:
            return
        stream = self._torch.cuda.current_stream()
        with self._cupy.cuda.ExternalStream(stream.cuda_stream):
            at = self._times.data_ptr() + 8 * len(self.gpu_marks)
            self._mark((1,), (1,), (self._cupy.uint64(at),))
        self.gpu_marks.append(name)

    def _calibrate(self) -> int:
        best = (1 << 62, 0)
        for _ in range(50):
            self.gpu_marks.clear()
            before = time.monotonic_ns()
            self.gpu("calibration")
            self._torch.cuda.current_stream().synchronize()
            after = time.monotonic_ns()
            best = min(best, (after - before, (before + after) // 2 - int(self._times[0])))
        self.gpu_marks.clear()
        return best[1]

    def _wrap(
        self, owner: Any, name: str, label: str | Callable[..., str], *, before: bool = False, after: bool = False
    ) -> None:
        """Host marks around a method, and GPU marks before or after what it launches. ``label`` may depend on what the method is called with."""
        original = getattr(owner, name, None)
        if original is None:
            return

        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            mark = label if isinstance(label, str) else label(*args, **kwargs)
            if before:
                self.gpu(f"{mark}<")
            self.host(f"{mark}<")
            try:
                return original(*args, **kwargs)
            finally:
                self.host(f"{mark}>")
                if after:
                    self.gpu(f"{mark}>")

        own = vars(owner) if hasattr(owner, "__dict__") else {}
        self._restore.append((owner, name, own.get(name), name in own))
        setattr(owner, name, run)

    def _put_in(self, worker: Any) -> None:
        from vllm.distributed.parallel_state import get_pp_group

        runner = worker.model_runner
        self._wrap(worker, "execute_model", _step)
        self._wrap(worker, "sample_tokens", "sample_tokens")
        self._wrap(runner, "update_pp_decode_requests", "tokens_taken", after=True)
        self._wrap(runner, "prepare_inputs", "prepare_inputs", before=True, after=True)
        self._wrap(runner, "prepare_attn", "prepare_attn")
        self._wrap(runner, "sample", "sample", before=True, after=True)
        self._wrap(runner, "postprocess_sampled", "postprocess_sampled")
        self._wrap(getattr(runner, "cudagraph_manager", None), "run_fullgraph", "graph", before=True, after=True)
        handler = getattr(runner, "pp_handler", None)
        self._wrap(handler, "broadcast", "broadcast", before=True)
        self._wrap(handler, "receive", "receive")
        group = get_pp_group()
        if group.world_size > 1:
            self._wrap(group, "isend_tensor_dict", "hidden_sent", before=True)
            from rayless.vllm.pipeline import hop, tokens

            self._wrap(hop.Coming, "take", "hidden_header")
            self._wrap(hop.Coming, "wait", "hidden_taken", after=True)
            self._wrap(tokens.Tokens, "confirm", "tokens_confirmed")
            self._wrap(tokens.Tokens, "_fill", "tokens_header")

    def take_out(self) -> dict[str, Any]:
        """Restores what was wrapped, and gives the marks."""
        for owner, name, value, own in reversed(self._restore):
            if own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)
        times = [] if self._times is None else self._times[: len(self.gpu_marks)].tolist()
        gpu = [(name, at + self.offset) for name, at in zip(self.gpu_marks, times, strict=True)]
        return {"host": self.host_marks, "gpu": gpu, "offset": self.offset}


def _step(output: Any, *_: Any, **__: Any) -> str:
    """The label of an ``execute_model``."""
    return "step" if output.total_num_scheduled_tokens else "empty"


def pause(worker: Any) -> None:
    """In a worker: keeps the engine busy for a moment."""
    time.sleep(0.03)


def start(worker: Any) -> None:
    """In a worker."""
    global current
    current = Trace(worker)


def stop(worker: Any) -> dict[str, Any]:
    """In a worker."""
    trace: Trace = current
    if trace._times is not None:
        trace._torch.cuda.synchronize()
    return trace.take_out()


def start_kernels(worker: Any) -> None:
    """In a worker."""
    from torch.profiler import ProfilerActivity, profile

    global current
    current = profile(activities=[ProfilerActivity.CUDA])
    current.start()


def stop_kernels(worker: Any) -> list[tuple[str, int, float]]:
    """In a worker: name, count and total microseconds of what ran longest."""
    current.stop()
    rows = [(row.key, row.count, row.self_device_time_total) for row in current.key_averages()]
    rows.sort(key=lambda row: -row[2])
    return [("all", sum(row[1] for row in rows), sum(row[2] for row in rows)), *rows[:25]]


def start_calls(worker: Any) -> None:
    """In a worker."""
    import cProfile

    global current
    current = cProfile.Profile(time.perf_counter)
    current.enable()


def stop_calls(worker: Any) -> list[tuple[str, int, float, float]]:
    """In a worker: function, calls, own and whole milliseconds."""
    import pstats

    current.disable()
    stats: dict[Any, Any] = pstats.Stats(current).stats  # type: ignore[attr-defined]
    rows = []
    for (file, line, name), (_, calls, own, whole, _) in stats.items():
        rows.append((f"{'/'.join(file.split('/')[-3:])}:{line} {name}", calls, 1e3 * own, 1e3 * whole))
    by_own = sorted(rows, key=lambda row: -row[2])[:40]
    by_whole = sorted(rows, key=lambda row: -row[3])[:60]
    return by_own + [row for row in by_whole if row not in by_own]
