"""Teaches vLLM the executor name ``rayless``; loaded by vLLM through the entry point ``vllm.general_plugins``.

vLLM has no registry of executor names. It accepts an executor *class*, but a bare name on the command line is
refused with pipeline parallelism, since the check looks for ``supports_pp`` on the string. So the name is
turned into the class at the start of ``EngineArgs.create_engine_config``, which every entry point of vLLM
passes, before that check. And vLLM's front end waits for EngineCore to stop its workers (``rayless.vllm.ending``). Nothing else of
vLLM is changed.

- RAYLESS_DEFAULT=1: the executor when ``--distributed-executor-backend`` is not given.
- RAYLESS_AS_RAY=1: ``--distributed-executor-backend ray`` means rayless, for launch scripts that cannot change.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from rayless.vllm.environment import flag

NAME = "rayless"
#: The first release whose workers send tensors between stages themselves and split sampling from execution.
OLDEST = "0.15"
_PATCHED = "__rayless__"


def register() -> None:
    """Entry point; vLLM calls it in the front end, in EngineCore and in every worker, any number of times."""
    if os.environ.get("RAYLESS_RANK"):
        return  # a worker: executors are chosen by the driver
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor.abstract import Executor

    if not getattr(EngineArgs.create_engine_config, _PATCHED, False):
        EngineArgs.create_engine_config = _create_engine_config(EngineArgs.create_engine_config)
    if not getattr(Executor.get_class, _PATCHED, False):
        Executor.get_class = staticmethod(_get_class(Executor.get_class))


def resolve(backend: Any, *, nnodes: int = 1) -> Any:
    """What ``--distributed-executor-backend`` means: our class where it names us, unchanged otherwise."""
    ours = (
        backend == NAME
        or (backend == "ray" and flag("RAYLESS_AS_RAY"))
        # vLLM's own multi-node launch (--nnodes) is a choice of executor too.
        or (backend is None and nnodes == 1 and flag("RAYLESS_DEFAULT"))
    )
    if not ours:
        return backend
    from vllm.v1.executor.abstract import Executor

    if not hasattr(Executor, "sample_tokens"):
        import vllm

        raise RuntimeError(
            f"vLLM {vllm.__version__} is too old for the rayless executor\nhint: install vLLM {OLDEST} or newer, on every node"
        )
    from rayless.vllm.ending import let_engines_end
    from rayless.vllm.executor import RaylessExecutor

    let_engines_end()
    return RaylessExecutor


def _create_engine_config(original: Any) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        nnodes = getattr(self, "nnodes", 1) or 1
        self.distributed_executor_backend = resolve(self.distributed_executor_backend, nnodes=nnodes)
        return original(self, *args, **kwargs)

    setattr(create_engine_config, _PATCHED, True)
    return create_engine_config


def _get_class(original: Any) -> Any:
    """For a configuration that was built by hand, with the name in it."""

    @functools.wraps(original)
    def get_class(vllm_config: Any) -> Any:
        backend = resolve(vllm_config.parallel_config.distributed_executor_backend)
        return backend if isinstance(backend, type) else original(vllm_config)

    setattr(get_class, _PATCHED, True)
    return get_class
