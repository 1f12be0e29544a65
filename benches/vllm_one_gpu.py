"""vLLM's step with one stage and with two, all on one GPU: beside each other in one sitting, in turns.

    python benches/vllm_one_gpu.py --out DIR [--rounds 5] [--repeats 5] [--only SIDE,...] [--skip SIDE,...] [--overlay SITE] [--traces]

An 8-layer Llama of hidden size 1024 with random weights (made here), vLLM's V2 runner, async scheduling, CUDA graphs for decodes. All engines are
started at once and stay; then they are measured one after the other, round by round (A B C A B C), the others idle. A figure is the time
of one step: a long request less a short one, per token. Sides:

- ``own``: vLLM's own executor, one stage; ``pp1``: rayless's, one stage;
- ``pp2``: rayless, two stages on the one GPU, over its links; ``ahead``: with RAYLESS_PIPELINE=rayless-ahead;
- ``gloo``: the same with the links staged through host memory and gloo (`one_gpu/gloo_links.py`): NCCL refuses two ranks on one GPU;
- ``…-mps``: the same, with the processes of that side under NVIDIA's MPS, which lets them run side by side: alone they take turns on the GPU;
- ``own-f32``, ``pp2-f32-mps``, ``ahead-f32-mps``: float32, only for the comparison of tokens;
- ``other``, ``other-mps``: as ``pp2…``, with the package in ``--overlay`` in the place of the installed one (RAYLESS_PIPELINE=``--overlay-pipeline``).

In a batch all requests are in one step: an engine of two stages alternates between two, and what arrives late falls into the other. ``--traces``
prints where a step's time goes, by marks in every rank (`one_gpu/tracing.py`), and keeps these, kernels and functions in ``--out``; it is
measured apart from the figures, since marks cost time. Needs vLLM for CUDA (0.25 here), ``rayless`` on PATH and PYTHONPATH, and, for traces, cupy. ``--cpu`` runs
the same on vLLM's CPU build: a rehearsal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
HERE = REPOSITORY / "benches" / "one_gpu"
sys.path[:0] = [str(HERE), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "setup")]

import marks

from nodes import new_token, rayless_command
from serving import CPU_ENVIRONMENT
from tiny_models import INIT_STD
from vllm_pp2 import summary

BATCHES = (1, 16)
SHORT, LONG = 8, 136
#: Share of the GPU that each worker holds, by rayless's books.
SHARE = "0.04"
SIDES: dict[str, dict[str, Any]] = {
    "own": {"stages": 1, "rayless": False},
    "pp1": {"stages": 1},
    "pp2": {"stages": 2},
    "pp2-mps": {"stages": 2, "mps": True},
    "ahead": {"stages": 2, "pipeline": "rayless-ahead"},
    "ahead-mps": {"stages": 2, "pipeline": "rayless-ahead", "mps": True},
    "other": {"stages": 2, "overlay": True},
    "other-mps": {"stages": 2, "overlay": True, "mps": True},
    "gloo": {"stages": 2, "gloo": True},
    "gloo-mps": {"stages": 2, "gloo": True, "mps": True},
    "own-f32": {"stages": 1, "rayless": False, "dtype": "float32"},
    "pp2-f32-mps": {"stages": 2, "dtype": "float32", "mps": True},
    "ahead-f32-mps": {"stages": 2, "pipeline": "rayless-ahead", "dtype": "float32", "mps": True},
    "other-f32-mps": {"stages": 2, "overlay": True, "dtype": "float32", "mps": True},
}


def make_model(folder: Path, cpu: bool) -> Path:
    """Random weights from a fixed seed; wide enough for tokens that vary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, heads, vocabulary = (256, 512, 4, 512) if cpu else (1024, 2816, 16, 32000)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=8,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        initializer_range=INIT_STD,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


class Engine:
    """One process of `one_gpu/engine.py`."""

    def __init__(self, name: str, model: Path, base: Path, out: Path, options: argparse.Namespace) -> None:
        side = SIDES[name]
        self.name = name
        settings = {
            "path": str(model),
            "dtype": side.get("dtype", "bfloat16"),
            "stages": side["stages"],
            "rayless": side.get("rayless", True),
            "gloo": side.get("gloo", False),
            "cpu": options.cpu,
            "backend": options.backend,
        }
        env = {key: value for key, value in os.environ.items() if not key.startswith(("RAYLESS_", "CUDA_MPS_"))}
        paths = [str(HERE), *env.get("PYTHONPATH", "").split(os.pathsep)]
        if side.get("overlay"):
            paths.insert(0, str(options.overlay))
        env |= {
            "PYTHONPATH": os.pathsep.join(paths),
            "RAYLESS_RUN_DIR": str(base / "node"),
            "RAYLESS_GPUS_PER_WORKER": SHARE,
            "RAYLESS_PIPELINE": options.overlay_pipeline if side.get("overlay") else side.get("pipeline", "rayless"),
            "BENCH_GLOO_LINKS": "1" if side.get("gloo") else "0",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            "VLLM_DISABLE_PYNCCL": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_USE_DEEP_GEMM": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "0" if options.cpu else "1",
            # On a GPU nobody reads what of these begins with VLLM_CPU.
            **CPU_ENVIRONMENT,
        }
        if side.get("mps"):
            env["CUDA_MPS_PIPE_DIRECTORY"] = str(base / "mps")
        self._log = (out / f"{name}.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "engine.py")],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(settings) + "\n")
        self._process.stdin.flush()
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def answer(self, timeout: float) -> Any:
        """The next line."""
        line = self._answers.get(timeout=timeout)
        if not line:
            raise RuntimeError(f"{self.name}: ended with {self._process.wait(10)}")
        return json.loads(line)

    def ask(self, do: str, timeout: float = 60, **arguments: Any) -> Any:
        """Runs a command and gives its value."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        found = self.answer(timeout)
        if "error" in found:
            raise RuntimeError(f"{self.name}: {do}: {found['error']}")
        return found["value"]

    def close(self) -> None:
        """Asks it to end; kills it where it does not."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.write('{"do": "end"}\n')
            self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


@contextlib.contextmanager
def node(base: Path, out: Path) -> Iterator[None]:
    """A cluster of this machine alone, and MPS where there is one."""
    rayless = rayless_command()
    shared = ["--token-file", str(new_token(base)), "--run-dir", str(base / "node")]
    command = [rayless, "head", "--daemon", "--bind", "127.0.0.1", "--port", "6479", "--cpus", "16", *shared]
    subprocess.run(command, check=True, stdout=sys.stderr)
    mps = shutil.which("nvidia-cuda-mps-control")
    env = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(base / "mps"), "CUDA_MPS_LOG_DIRECTORY": str(out)}
    if mps:
        (base / "mps").mkdir()
        subprocess.run([mps, "-d"], env=env, check=True)
    print(f"MPS: {mps or 'none here'}", flush=True)
    try:
        yield
    finally:
        subprocess.run([rayless, "stop", "--run-dir", str(base / "node")], check=False, stdout=sys.stderr)
        if mps:
            subprocess.run([mps], env=env, input="quit -t 5\n", text=True, check=False)


def start(names: list[str], *place: Any) -> dict[str, Engine]:
    """All engines that come up; they share the time that this takes."""
    begin = time.monotonic()
    started = {name: Engine(name, *place) for name in names}
    up = {}
    for name, engine in started.items():
        try:
            engine.answer(max(1.0, place[-1].patience - (time.monotonic() - begin)))
            up[name] = engine
            print(f"{name}: up after {time.monotonic() - begin:.0f} s", flush=True)
        except (RuntimeError, queue.Empty) as error:
            print(f"{name}: did not come up: {error!r}", flush=True)
            engine.close()
    return up


def measure(engines: dict[str, Engine], options: argparse.Namespace, rows: dict[str, dict[int, list[float]]]) -> None:
    """All rounds; a side that fails is left out from there on."""
    for turn in range(options.rounds):
        for name in list(engines):
            for batch in BATCHES:
                try:
                    asked = {"batch": batch, "repeats": options.repeats, "short": SHORT, "long": LONG}
                    values = engines[name].ask("time", **asked)
                except (RuntimeError, queue.Empty, OSError) as error:
                    print(f"{name}: {error!r}", flush=True)
                    engines.pop(name).close()
                    break
                rows.setdefault(name, {}).setdefault(batch, []).extend(values)
        now = {name: [round(statistics.median(rows[name][batch]), 2) for batch in BATCHES] for name in engines}
        print(f"round {turn + 1}: {now}", flush=True)


def table(rows: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    """Medians, extremes and n of each side and batch, and the ratio to the side before them all."""
    found: dict[str, Any] = {}
    for name, batches in rows.items():
        for batch, values in batches.items():
            first = next(iter(rows))
            ratio = statistics.median(values) / statistics.median(rows[first][batch])
            found[f"{name}, batch {batch}"] = row = {**summary(values, digits=3), f"to_{first}": round(ratio, 2)}
            print(f"{name:14} batch {batch:2}: {row}", flush=True)
    return found


def observe(engines: dict[str, Engine], out: Path, cpu: bool) -> None:
    """Marks, kernels and functions, a file per side."""
    for name, engine in engines.items():
        found: dict[str, Any] = {}
        for do, count in (("trace", 100), ("calls", 200)) if cpu else (("trace", 100), ("kernels", 40), ("calls", 200)):
            for batch in BATCHES:
                try:
                    found[f"{do}-{batch}"] = engine.ask(do, batch=batch, count=count)
                except (RuntimeError, queue.Empty, OSError) as error:
                    print(f"{name}: {do}: {error!r}", flush=True)
                    continue
                if do == "trace":
                    print(f"{name}, batch {batch}, microseconds from a step's beginning", flush=True)
                    marks.show(found[f"{do}-{batch}"])
        (out / f"observed-{name}.json").write_text(json.dumps(found))


def compare_tokens(engines: dict[str, Engine], count: int) -> dict[str, Any]:
    """Every side's tokens beside those of the first side of its dtype."""
    found: dict[str, Any] = {}
    first: dict[str, str] = {}
    tokens: dict[tuple[str, int], Any] = {}
    for name, engine in engines.items():
        kind = SIDES[name].get("dtype", "bfloat16")
        beside = first.setdefault(kind, name)
        for batch in BATCHES:
            try:
                tokens[name, batch] = mine = engine.ask("tokens", batch=batch, count=count)
            except (RuntimeError, queue.Empty, OSError) as error:
                print(f"{name}: {error!r}", flush=True)
                continue
            theirs = tokens.get((beside, batch))
            equal = sum(a == b for a, b in zip(mine, theirs or [], strict=False))
            different = len({token for row in mine for token in row})
            found[f"{name}, batch {batch}"] = {"kind": kind, "beside": beside, "equal": equal, "of": batch}
            print(
                f"tokens {name}, batch {batch}: {equal} of {batch} answers as {beside}'s; {different} different tokens"
            )
    return found


def main() -> None:
    """Prints as it goes; everything is in ``--out`` as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="measurements per round, side and batch")
    parser.add_argument("--only", default="", help="sides, by commas")
    parser.add_argument("--skip", default="", help="sides to leave out")
    parser.add_argument("--overlay", type=Path, help="folder with another build of the package")
    parser.add_argument("--overlay-pipeline", default="rayless", help="RAYLESS_PIPELINE of that build's sides")
    parser.add_argument("--traces", action="store_true")
    parser.add_argument("--backend", default="", help="vLLM's attention backend (default: its choice)")
    parser.add_argument("--patience", type=float, default=240.0, help="seconds for all engines to come up")
    parser.add_argument("--model", type=Path, help="a model that is there already")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    skipped = options.skip.split(",") + ([] if options.overlay else [name for name in SIDES if "other" in name])
    names = [name for name in (options.only.split(",") if options.only else SIDES) if name not in skipped]
    rows: dict[str, dict[int, list[float]]] = {}
    result: dict[str, Any] = {"rounds": options.rounds, "repeats": options.repeats}
    with tempfile.TemporaryDirectory(prefix="rl1gpu-", dir="/var/tmp") as folder:
        base = Path(folder)
        model = options.model or base / "model"
        if not (model / "config.json").exists():
            make_model(model, options.cpu)
        with node(base, options.out):
            engines = start(names, model, base, options.out, options)
            try:
                result["tokens"] = compare_tokens(engines, 64)
                timed = {name: engine for name, engine in engines.items() if "f32" not in name}
                measure(timed, options, rows)
                result["steps"] = table(rows)
                (options.out / "one_gpu.json").write_text(json.dumps({**result, "values": rows}, indent=1))
                if options.traces:
                    observe(timed, options.out, options.cpu)
            finally:
                for engine in engines.values():
                    engine.close()


if __name__ == "__main__":
    main()
