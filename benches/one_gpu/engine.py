"""One engine of `vllm_one_gpu.py`: it reads its settings and then one command a line from stdin, as JSON, and answers each with a line of JSON.

Settings: ``path``, ``stages``, ``dtype``, ``rayless`` (the executor), ``gloo`` (its links), ``cpu``. Commands: ``{"do": "time", "batch", "repeats",
"short", "long"}``, ``{"do": "tokens", "batch", "count"}``, ``{"do": "trace", "batch", "count"}``, ``{"do": "kernels", …}``, ``{"do": "calls", …}``, ``{"do": "end"}``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import tracing


def build(settings: dict[str, Any]) -> Any:
    """The engine: an 8-layer model, CUDA graphs for decodes, no compiler, no prefix cache."""
    from vllm import LLM

    options: dict[str, Any] = {
        "dtype": settings["dtype"],
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "pipeline_parallel_size": settings["stages"],
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    if settings.get("cpu"):
        options |= {"compilation_config": {"mode": 2, "backend": "eager"}, "max_model_len": 512}
    else:
        options |= {
            "compilation_config": {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
            },
            "async_scheduling": True,
            # Several engines and ranks share the GPU; nobody profiles what is free.
            "kv_cache_memory_bytes": 1 << 30,
            "gpu_memory_utilization": 0.02,
        }
        if settings.get("backend"):
            options["attention_config"] = {"backend": settings["backend"]}
    if settings["rayless"]:
        options["distributed_executor_backend"] = "rayless"
    if settings.get("gloo"):
        options["worker_extension_cls"] = "gloo_links.GlooLinks"
    return LLM(settings["path"], **options)


def prompts(batch: int) -> list[dict[str, list[int]]]:
    """Of one length and different contents."""
    return [{"prompt_token_ids": [3 + (7 * row + 3 * i) % 500 for i in range(16)]} for row in range(batch)]


class Engine:
    """The commands."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._llm = build(settings)

    def _generate(self, batch: int, count: int) -> list[list[int]]:
        from vllm import SamplingParams

        # While the engine is busy with this, all requests arrive, and are in its next step: else those of two stages would fall into
        # one or both of the two steps that such an engine alternates between.
        threading.Thread(target=self._llm.collective_rpc, args=(tracing.pause,)).start()
        time.sleep(0.005)

        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        answers = self._llm.generate(prompts(batch), sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def _seconds(self, batch: int, count: int) -> float:
        begin = time.perf_counter()
        self._generate(batch, count)
        return time.perf_counter() - begin

    def time(self, batch: int, repeats: int, short: int, long: int) -> list[float]:
        """Milliseconds per step: a long request less a short one, so that prefill and submission cancel out."""
        self._seconds(batch, short)
        return [
            1000 * (self._seconds(batch, long) - self._seconds(batch, short)) / (long - short) for _ in range(repeats)
        ]

    def tokens(self, batch: int, count: int) -> list[list[int]]:
        """What is generated, greedily."""
        return self._generate(batch, count)

    def _observed(self, start: Any, stop: Any, batch: int, count: int) -> list[Any]:
        self._generate(batch, 8)
        self._llm.collective_rpc(start)
        self._generate(batch, count)
        found: list[Any] = self._llm.collective_rpc(stop)
        return found

    def trace(self, batch: int, count: int) -> list[Any]:
        """Every rank's marks."""
        return self._observed(tracing.start, tracing.stop, batch, count)

    def kernels(self, batch: int, count: int) -> list[Any]:
        """Every rank's kernels, by torch's profiler."""
        return self._observed(tracing.start_kernels, tracing.stop_kernels, batch, count)

    def calls(self, batch: int, count: int) -> list[Any]:
        """Every rank's functions, by cProfile."""
        return self._observed(tracing.start_calls, tracing.stop_calls, batch, count)


def main() -> None:
    """Until ``end``."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    engine = Engine(json.loads(sys.stdin.readline()))

    def answer(value: Any) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    answer("ready")
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        if do == "end":
            break
        try:
            answer({"value": getattr(engine, do)(**command)})
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"[:2000]})
    engine._llm.llm_engine.engine_core.shutdown()
    answer("over")
    os._exit(0)


if __name__ == "__main__":
    main()
