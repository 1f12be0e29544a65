"""Generates with two stages and counts what its workers give to torch.distributed; started by `test_pipeline.py`.

argv[1]: JSON of [path, prompts, count, [value of RAYLESS_PIPELINE, ...]]. The last line is JSON: for each value the tokens and each
rank's counts. With links, the last engine is then brought out of step, and what became of it comes with its figures.
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


def send_out_of_step(worker: Any) -> None:
    """On the first stage: a message that no step of the second one takes."""
    import torch
    from vllm.distributed.parallel_state import get_pp_group

    group = get_pp_group()
    if group.is_first_rank:
        group.isend_tensor_dict({"hidden_states": torch.zeros(1, 64), "residual": torch.zeros(1, 64)})


def fail(llm: Any, sampling: Any) -> dict[str, str]:
    """What a request gets when the stages are at different steps, and what is left of the group."""
    import pipeline_driver

    executor = llm.llm_engine.engine_core.engine_core.model_executor
    llm.collective_rpc(pipeline_driver.send_out_of_step)
    told = ""
    try:
        llm.generate(["Hello"], sampling, use_tqdm=False)
    except Exception as error:
        # vLLM's own clearing up may fail on top of it.
        chain: BaseException | None = error
        while chain is not None:
            told += f"{chain}\n"
            chain = chain.__cause__ or chain.__context__
    left = ""
    try:
        executor.check_health()
    except Exception as error:
        left = str(error)
    return {"told": told, "left": left}


def generate(path: str, prompts: list[str], count: int, then_fail: bool) -> dict[str, Any]:
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
    if then_fail:
        found["failure"] = fail(llm, sampling)
        return found
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
        found.append(generate(path, prompts, count, then_fail=switch == "rayless"))
    print(json.dumps(found), flush=True)
    # An engine that failed in this process is not taken apart in order.
    os._exit(0)


if __name__ == "__main__":
    main()
