"""vLLM's pipeline stages on one GPU: what a step costs with both stages there, beside one stage, and beside the hop staged through gloo.

    python benches/vllm_one_gpu.py steps  [--turns 4] [--repeats 3] [--only SIDE,...] [--out FILE]
    python benches/vllm_one_gpu.py tokens [--out FILE]      greedy tokens in float32, two stages beside one, batch 1 and 16
    python benches/vllm_one_gpu.py trace  --traces FOLDER   torch's profiler over some steps of the two stages, one file a rank

Engines of all sides are up at the same time, each in a process of its own, and are measured in turns (A B C A B C), the others at rest. A
figure is the time of one step: the difference between a long and a short generation, per token, so that prefill cancels out.
The model is a random Llama (8 layers, hidden size 1024), so nearly all of a step is what vLLM, the executor and the hop cost.

Needs a GPU, vLLM with its V2 runner (0.25 here), transformers, and a node daemon that is up (``rayless head --daemon --gpus 1``). Two processes take
turns on a GPU, which costs more than a hop: start NVIDIA's MPS before (``nvidia-cuda-mps-control -d``); the output says which it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHORT, LONG = 8, 200
VOCABULARY, PROMPT = 8192, 32
BATCHES = (1, 16)
#: Of every engine: two ranks on one GPU are told apart by nothing but their share of it.
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # It would open a communicator between the two ranks, which NCCL refuses on one GPU.
    "VLLM_DISABLE_PYNCCL": "1",
    "RAYLESS_GPUS_PER_WORKER": "0.1",
}
#: Stages, executor, environment, more options of ``LLM``.
SIDES: dict[str, tuple[int, str | None, dict[str, str], dict[str, Any]]] = {
    "one stage, vLLM's executor": (1, None, {}, {}),
    "one stage, rayless": (1, "rayless", {}, {}),
    "two stages, rayless": (2, "rayless", {}, {}),
    "two stages, rayless-ahead": (2, "rayless", {"RAYLESS_PIPELINE": "rayless-ahead"}, {}),
    "two stages, gloo": (2, "rayless", {"RAYLESS_PIPELINE": "torch"}, {"worker_extension_cls": "gloo_staging.Staged"}),
}
PLAIN, STAGES, AHEAD = "one stage, rayless", "two stages, rayless", "two stages, rayless-ahead"


def model() -> Path:
    """The model's folder; made once. Without a tokenizer: prompts are token ids."""
    folder = Path(tempfile.gettempdir()) / "rayless-bench-llama-8x1024"
    if not (folder / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=8,
            num_attention_heads=16,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            # Wider than the usual 0.02: with that a random model repeats one token, and a broken hop would not show.
            initializer_range=0.08,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def prompts(batch: int) -> list[dict[str, list[int]]]:
    """The same ones on every side."""
    source = random.Random(batch)
    return [{"prompt_token_ids": [source.randrange(VOCABULARY) for _ in range(PROMPT)]} for _ in range(batch)]


def serve(side: str, dtype: str, traces: str) -> None:
    """One engine: answers lines on stdin until there are none left."""
    from vllm import LLM, SamplingParams

    stages, executor, _, more = SIDES[side]
    if traces:
        kinds = {"profiler": "torch", "torch_profiler_dir": traces, "torch_profiler_with_stack": False}
        more = {**more, "profiler_config": kinds}
    llm = LLM(
        str(model()),
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=1024,
        # Given, not found by looking at a GPU that the other sides fill at the same time.
        kv_cache_memory_bytes=1 << 30,
        gpu_memory_utilization=0.05,
        async_scheduling=True,
        enable_prefix_caching=False,
        pipeline_parallel_size=stages,
        distributed_executor_backend=executor,
        **more,
    )
    print("READY", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.get("trace"):
            llm.start_profile()
        sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        answers = llm.generate(prompts(asked["batch"]), sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        if asked.get("trace"):
            llm.stop_profile()
        tokens = [list(answer.outputs[0].token_ids) for answer in answers]
        print("ANSWER " + json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


class Engine:
    """A side's process."""

    def __init__(self, side: str, logs: Path, dtype: str = "bfloat16", traces: str = "", **environment: str) -> None:
        self.side = side
        # Sides compile the same model at the same time: each has a cache of its own.
        name = "".join(letter if letter.isalnum() else "-" for letter in f"{side} {dtype}")
        cache = Path(tempfile.gettempdir()) / "rayless-bench-cache" / name
        env = {**os.environ, **ENVIRONMENT, **SIDES[side][2], "VLLM_CACHE_ROOT": str(cache), **environment}
        env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
        self.log = logs / f"{name}.log"
        command = [sys.executable, str(Path(__file__).resolve()), "serve", "--only", side, "--dtype", dtype]
        self.process = subprocess.Popen(
            [*command, "--traces", traces],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=env,
            text=True,
        )

    def _line(self, begins: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(begins):
                return line.removeprefix(begins)
        raise RuntimeError(f"`{self.side}` ended\nhint: look into {self.log}")

    def wait_ready(self) -> None:
        """Waits until it answers."""
        self._line("READY")

    def generate(self, batch: int, tokens: int, trace: bool = False) -> dict[str, Any]:
        """``{"seconds", "tokens"}`` of one generation."""
        assert self.process.stdin is not None
        print(json.dumps({"batch": batch, "tokens": tokens, "trace": trace}), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._line("ANSWER "))
        return answer

    def step_milliseconds(self, batch: int) -> float:
        """Of one step."""
        seconds = [float(self.generate(batch, tokens)["seconds"]) for tokens in (LONG, SHORT)]
        return 1000 * (seconds[0] - seconds[1]) / (LONG - SHORT)

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start(engines: list[Engine]) -> list[Engine]:
    """Those that came up; of the others it is said."""
    up = []
    for engine in engines:
        try:
            engine.wait_ready()
            up.append(engine)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
    return up


def steps(given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per step of every side, in turns."""
    sides = [side for side in SIDES if not given.only or side in given.only.split(";")]
    engines = start([Engine(side, given.logs) for side in sides])
    values: dict[str, dict[int, list[float]]] = {engine.side: {batch: [] for batch in BATCHES} for engine in engines}
    for engine in engines:
        for batch in BATCHES:
            engine.step_milliseconds(batch)  # warm
    for turn in range(given.turns):
        for engine in engines:
            for batch in BATCHES:
                values[engine.side][batch] += [engine.step_milliseconds(batch) for _ in range(given.repeats)]
        for side, batches in values.items():
            medians = ", ".join(f"batch {batch}: {statistics.median(ms):.2f} ms" for batch, ms in batches.items())
            print(f"turn {turn + 1}: {side}: {medians}", file=sys.stderr, flush=True)
    for engine in engines:
        engine.close()
    return {
        side: {
            f"batch_{batch}": {
                "median_ms": round(statistics.median(ms), 3),
                "min_ms": round(min(ms), 3),
                "max_ms": round(max(ms), 3),
                "n": len(ms),
            }
            for batch, ms in batches.items()
        }
        for side, batches in values.items()
    }


def tokens(given: argparse.Namespace) -> dict[str, Any]:
    """Greedy tokens in float32. The engine runs in the process that asks, so that all requests of a batch begin at one step."""
    inside = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    sides = (PLAIN, STAGES, AHEAD)
    engines = start([Engine(side, given.logs, "float32", **inside) for side in sides])
    found = {
        engine.side: {batch: engine.generate(batch, LONG)["tokens"] for batch in (*BATCHES, *BATCHES)}
        for engine in engines
    }
    for engine in engines:
        engine.close()
    compared: dict[str, Any] = {}
    for side in found:
        if side != PLAIN and PLAIN in found:
            for batch in BATCHES:
                pairs = list(zip(found[PLAIN][batch], found[side][batch], strict=True))
                compared[f"{side}, batch {batch}"] = f"{sum(a == b for a, b in pairs)} of {len(pairs)} sequences equal"
    distinct = {side: len({token for row in batches[16] for token in row}) for side, batches in found.items()}
    return {"tokens_each": LONG, "compared_with": PLAIN, **compared, "distinct_tokens_in_batch_16": distinct}


def trace(given: argparse.Namespace) -> dict[str, Any]:
    """Profiles some steps of the two stages, and of one."""
    found = {}
    for side in (PLAIN, STAGES, AHEAD):
        folder = Path(given.traces).resolve() / "".join(letter if letter.isalnum() else "-" for letter in side)
        folder.mkdir(parents=True, exist_ok=True)
        engine = Engine(side, given.logs, traces=str(folder))
        if start([engine]):
            for batch in BATCHES:
                engine.step_milliseconds(batch)
                engine.generate(batch, 24, trace=True)
            found[side] = sorted(path.name for path in folder.iterdir())
            engine.close()
    return found


def main() -> None:
    """Prints JSON on stdout, or writes it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "tokens", "trace", "serve"])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="measurements a turn, side and batch size")
    parser.add_argument("--only", default="", help="sides, by semicolons")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--traces", default="", help="folder for the profiler's files")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.what == "serve":
        serve(given.only, given.dtype, given.traces)
        return
    model()
    served = subprocess.run(["pgrep", "-x", "nvidia-cuda-mps"], capture_output=True, check=False).returncode == 0
    result = {"mps": served, given.what: {"steps": steps, "tokens": tokens, "trace": trace}[given.what](given)}
    text = json.dumps(result, indent=2)
    if given.out:
        given.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
