"""Generates with two stages and counts what its workers give to torch.distributed; started by `test_pipeline.py`.

argv[1]: JSON of [path, prompts, count, [value of RAYLESS_PIPELINE, ...]]. The last line is JSON: for each value the tokens, each
rank's counts, and the links of the group.
"""

from __future__ import annotations

import collections
import gc
import json
import os
import sys
from typing import Any

#: In a worker: the counts since `start_counting`.
counted: collections.Counter[str] = collections.Counter()


def start_counting(worker: Any) -> None:
    """In every worker, when the engine is ready."""
    import coordinator
    import pipeline_driver

    pipeline_driver.counted = coordinator.count_collectives()


def counts(worker: Any) -> dict[str, int]:
    """In every worker, at the end."""
    import pipeline_driver

    return dict(pipeline_driver.counted)


def generate(path: str, prompts: list[str], count: int) -> dict[str, Any]:
    """One engine: all prompts at once, then one after the other."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from rayless.vllm.executor import RaylessExecutor
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    llm = LLM(
        path,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        # A long prompt takes several steps, and steps with and without decodes are mixed.
        max_num_batched_tokens=64,
        compilation_config={"mode": 2, "backend": "eager"},
        pipeline_parallel_size=2,
        distributed_executor_backend=RaylessExecutor,
    )
    import pipeline_driver

    llm.collective_rpc(pipeline_driver.start_counting)
    together = llm.generate(["word " * 200, *prompts], sampling, use_tqdm=False)
    alone = [llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts]
    found = {
        "together": [list(answer.outputs[0].token_ids) for answer in together],
        "tokens": [list(answer.outputs[0].token_ids) for answer in alone],
        "torch": llm.collective_rpc(pipeline_driver.counts),
    }
    engine = llm.llm_engine.engine_core
    del llm
    engine.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def main() -> None:
    """One line of JSON."""
    path, prompts, count, switches = json.loads(sys.argv[1])
    found = []
    for switch in switches:
        os.environ["RAYLESS_PIPELINE"] = switch
        found.append(generate(path, prompts, count))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
