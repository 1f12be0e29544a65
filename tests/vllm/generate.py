"""Runs models through vLLM's offline interface and prints their greedy tokens; started by the tests in a process of its own."""

from __future__ import annotations

import gc
import json
import sys


def main() -> None:
    """argv[1]: JSON of [prompts, count, [[name, path, options], ...]]; the last line printed is ``TOKENS`` and JSON."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm import LLM, SamplingParams

    prompts, count, runs = json.loads(sys.argv[1])
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    found = {}
    for name, path, options in runs:
        llm = LLM(
            path,
            dtype="float32",
            max_model_len=512,
            max_num_seqs=8,
            # With --enforce-eager, pipeline stages fail on CPU: a fault of vLLM's.
            compilation_config={"mode": 2, "backend": "eager"},
            # For latent attention; other models take what they have. On a CPU with AMX vLLM would take a backend that has no float32.
            attention_backend="CPU_MLA",
            **options,
        )
        # One at a time: which requests share a step depends on timing, and kernels round differently for other batch sizes.
        answers = [llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts]
        found[name] = [list(answer.outputs[0].token_ids) for answer in answers]
        engine = llm.llm_engine.engine_core
        del llm
        engine.shutdown()
        gc.collect()
        cleanup_dist_env_and_memory()
    print("TOKENS " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
