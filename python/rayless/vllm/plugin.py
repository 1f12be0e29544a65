"""Teaches vLLM the executor name ``rayless``; loaded by vLLM through the entry point ``vllm.general_plugins``.

vLLM has no registry of executor names. It accepts an executor *class*, but a bare name on the command line is
refused with pipeline parallelism, since the check looks for ``supports_pp`` on the string. So the name is
turned into the class at the start of ``EngineArgs.create_engine_config``, which every entry point of vLLM
passes, before that check. And where vLLM's front end would give EngineCore no time at all between SIGTERM and SIGKILL (0.25 and
newer, unless ``--shutdown-timeout`` is given), it gets the few seconds of earlier releases, which end as soon as it has ended:
it takes them to stop its workers in order. Nothing else of vLLM is changed.

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
#: Seconds at most from SIGTERM to SIGKILL of EngineCore where vLLM would give none; what it gave up to 0.20.
SHUTDOWN_SECONDS = 5.0


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
    from rayless.vllm.executor import RaylessExecutor

    _let_engines_end()
    return RaylessExecutor


def _let_engines_end() -> None:
    """Time for EngineCore to end by itself, where the front end would kill it in the moment in which it asks it to end.

    ``--shutdown-timeout 0`` (the default) says how long requests may go on: not at all. vLLM 0.25 and newer take it for the time of the
    process as well; only on ROCm do they make that difference.
    """
    from vllm.v1.engine.utils import CoreEngineProcManager

    original = getattr(CoreEngineProcManager, "shutdown", None)
    if original is None or getattr(original, _PATCHED, False):
        return

    @functools.wraps(original)
    def shutdown(self: Any, timeout: float | None = None) -> None:
        # A budget of which nothing is left is another matter: it was given for the requests.
        if timeout == 0 and not getattr(self, "_request_shutdown_timeout", 0):
            timeout = SHUTDOWN_SECONDS
        original(self, timeout=timeout)

    setattr(shutdown, _PATCHED, True)
    CoreEngineProcManager.shutdown = shutdown


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
