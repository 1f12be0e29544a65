"""The executor that vLLM's EngineCore drives: its workers are a rayless ``WorkerGroup``.

The group gives placement, processes, ordered calls and news of every death; what is added here is vLLM's:
which rank answers (the first of the last pipeline stage), what is aggregated, and the order of start-up.
"""

from __future__ import annotations

import concurrent.futures
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import cloudpickle
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.executor.abstract import Executor

import rayless
from rayless.exceptions import LinkError
from rayless.vllm import pipeline
from rayless.vllm.ending import end_with_front_end
from rayless.vllm.environment import gpus_per_worker
from rayless.vllm.placement import describe, make_plans
from rayless.vllm.preflight import compare, find
from rayless.vllm.worker import Worker
from vllm import envs

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

logger = init_logger("vllm.rayless")

#: Seconds that two stages get to open a link between them.
LINK_SECONDS = 60.0

#: Seconds that workers get to let go of devices and process groups before they are killed.
GRACE_SECONDS = 5.0
#: What an engine does again and again, each time in seconds at most: these have a deadline. Loading, profiling and compiling
#: do not: nobody knows how long they may take.
STEPS = frozenset({"execute_model", "sample_tokens", "execute_dummy_batch", "take_draft_token_ids"})
#: Seconds that ``check_health`` waits for every rank, as under vLLM's own executor.
HEALTH_SECONDS = 10.0


class RaylessExecutor(Executor):
    """Runs vLLM's workers on the nodes of a rayless cluster."""

    uses_ray: bool = False
    supports_pp: bool = True

    # `Executor.__init__` calls this before it sets its aggregators; they are not touched until a step.
    def _init_executor(self) -> None:
        self._cause: str | None = None
        self._callback: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._closed = False
        parallel = self.parallel_config
        self._world_size: int = parallel.world_size
        # Tensor-parallel rank 0 of the last stage: the only one with the sampled tokens.
        self._output_rank = self._world_size - parallel.tensor_parallel_size * getattr(
            parallel, "prefill_context_parallel_size", 1
        )
        _refuse_unsupported(self.vllm_config)
        end_with_front_end()
        self._pipeline_is_ours = parallel.pipeline_parallel_size > 1 and pipeline.is_ours()

        on_cpu = current_platform.is_cpu()
        bundle, strategy = _resources(on_cpu, parallel.pipeline_parallel_size)
        self._group = rayless.WorkerGroup.start(
            Worker,
            self._world_size,
            bundles=[bundle] * self._world_size,
            strategy=strategy,
            kwargs={
                "config": _pickled_config(self.vllm_config),
                "on_cpu": on_cpu,
                "pipeline": self._pipeline_is_ours,
            },
            name=_group_name(self.vllm_config),
            steps=("step",),
            step_deadline=_step_deadline(),
        )
        self._finalizer = weakref.finalize(self, self._group.stop)
        try:
            self._group.add_failure_callback(_failure_callback(self))
            self._bring_up()
        except BaseException:
            self._finalizer()
            raise

    def _bring_up(self) -> None:
        group = self._group
        plans = make_plans(group.ranks, str(group.id))
        for line in describe(plans, self.parallel_config.tensor_parallel_size):
            logger.info("%s", line)
        folder = _model_folder(self.vllm_config)
        compare([find("this driver", None), *group.call("inspect", plans, folder)], folder)
        rendezvous = next(url for url in group.call("boot") if url is not None)
        group.call("init_device", rendezvous)
        if self._pipeline_is_ours:
            group.call("open_links", LINK_SECONDS)
        group.call("load_model")

    # --- calls ---

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
        kv_output_aggregator: Any = None,
        ec_output_aggregator: Any = None,
    ) -> Any:
        """Runs a method on every rank, in the order of the calls.

        A list of all answers; with ``unique_reply_rank``, that rank's answer alone; with an aggregator, what it
        makes of all answers. ``non_block`` gives a Future of the same.
        """
        if self._cause is not None:
            raise RuntimeError(f"executor failed: {self._cause}")
        aggregators = [one for one in (kv_output_aggregator, ec_output_aggregator) if one is not None]
        reply_rank = None if aggregators else unique_reply_rank
        name = method if isinstance(method, str) else cloudpickle.dumps(method)
        inner = self._group.call_async(
            "step" if isinstance(method, str) and method in STEPS else "run",
            _pickled((name, args, kwargs or {}, reply_rank)),
            ranks=None if reply_rank is None else [reply_rank],
            timeout=timeout,
        )
        if aggregators:
            rank = unique_reply_rank or 0

            def finish(outputs: list[Any]) -> Any:
                result = outputs[rank]
                for one in aggregators:
                    # Each merges its own part into outputs[rank]; so they can follow each other.
                    result = one.aggregate(outputs, output_rank=rank)
                return result

            reply: concurrent.futures.Future[Any] = _Reply(inner, finish, self._lost)
        elif reply_rank is not None:
            reply = _Reply(inner, _only, self._lost)
        else:
            reply = inner
        return reply if non_block else reply.result()

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """One step on every rank; the answer comes from the output rank (None when sampling follows)."""
        return self._step("execute_model", (scheduler_output,), non_block)

    def sample_tokens(
        self, grammar_output: GrammarOutput | None, non_block: bool = False
    ) -> ModelRunnerOutput | concurrent.futures.Future[ModelRunnerOutput]:
        """Samples after ``execute_model`` answered None."""
        return self._step("sample_tokens", (grammar_output,), non_block)

    def _step(self, method: str, args: tuple[Any, ...], non_block: bool) -> Any:
        return self.collective_rpc(
            method,
            args=args,
            unique_reply_rank=self._output_rank,
            non_block=non_block,
            kv_output_aggregator=getattr(self, "kv_output_aggregator", None),
            ec_output_aggregator=getattr(self, "ec_output_aggregator", None),
        )

    def execute_dummy_batch(self) -> None:
        """A step without requests, which keeps the ranks of a data-parallel group in step."""
        self.collective_rpc(
            "execute_dummy_batch",
            unique_reply_rank=self._output_rank,
        )

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Draft tokens of speculative decoding, from the rank that samples."""
        drafts: DraftTokenIds | None = self.collective_rpc(
            "take_draft_token_ids",
            unique_reply_rank=self._output_rank,
        )
        return drafts

    # --- life and death ---

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        """Calls back once if the group fails; at once if it has failed already."""
        with self._lock:
            if self._cause is None:
                self._callback = callback
                return
        callback()

    def _fail(self, cause: BaseException) -> None:
        with self._lock:
            if self._closed or self._cause is not None:
                return
            self._cause = str(cause)
            callback, self._callback = self._callback, None
        logger.error("%s", cause)
        if callback is not None:
            callback()

    def _lost(self, cause: LinkError) -> None:
        """A link failed in a step: the group is over, for its other ranks may be waiting for what will never come."""
        self._fail(cause)
        self._finalizer()

    def check_health(self) -> None:
        """Raises unless every rank answers."""
        self.collective_rpc("check_health", timeout=HEALTH_SECONDS)

    def shutdown(self) -> None:
        """Ends the workers: asked first, killed after a grace period. May be called again."""
        # vLLM also calls this on an executor whose start-up failed.
        group = getattr(self, "_group", None)
        if group is None:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._cause is None:
            grace = getattr(envs, "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", GRACE_SECONDS)
            try:
                group.call("shutdown", timeout=min(float(grace), GRACE_SECONDS))
            except Exception as error:
                logger.debug("workers did not end by themselves: %s", error)
        self._finalizer()

    # --- what the scheduler asks ---

    @property
    def max_concurrent_batches(self) -> int:
        """Steps in flight that fill the pipeline; up to vLLM 0.20 the executor is asked for it."""
        stages: int = self.parallel_config.pipeline_parallel_size
        return 2 if stages <= 1 and self.scheduler_config.async_scheduling else stages

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Calls run in order, and outputs are fetched beside the worker's loop: so, yes."""
        return True


class _Reply(concurrent.futures.Future[Any]):
    """The Future of a group call, seen through ``finish``; it costs no second wake-up."""

    def __init__(
        self,
        inner: concurrent.futures.Future[list[Any]],
        finish: Callable[[list[Any]], Any],
        lost: Callable[[LinkError], None],
    ) -> None:
        super().__init__()
        self._inner = inner
        self._lost = lost
        self._finish: Callable[[list[Any]], Any] | None = finish
        self._value: Any = None

    def result(self, timeout: float | None = None) -> Any:
        try:
            outputs = self._inner.result(timeout)
        except LinkError as error:
            self._lost(error)
            raise
        if self._finish is not None:  # an aggregator changes what it gets: once only
            self._value, self._finish = self._finish(outputs), None
        return self._value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return self._inner.exception(timeout)

    def done(self) -> bool:
        return self._inner.done()

    def running(self) -> bool:
        return self._inner.running()

    def cancelled(self) -> bool:
        return self._inner.cancelled()

    def cancel(self) -> bool:
        return self._inner.cancel()

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Any]], Any]) -> None:
        self._inner.add_done_callback(lambda _inner: fn(self))


def _only(outputs: list[Any]) -> Any:
    return outputs[0]


def _failure_callback(executor: RaylessExecutor) -> Callable[[BaseException], None]:
    """Does not keep the executor alive: the group outlives it until it is finalized."""
    reference = weakref.ref(executor)

    def failed(cause: BaseException) -> None:
        alive = reference()
        if alive is not None:
            alive._fail(cause)

    return failed


def _pickled(value: Any) -> bytes:
    """Plain pickle where it can; by value for what another process cannot import (--trust-remote-code)."""
    try:
        return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError):
        data: bytes = cloudpickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        return data


def _pickled_config(config: VllmConfig) -> bytes:
    """The configuration, with the classes that --trust-remote-code generated in it by value.

    Those live in ``transformers_modules``, which exists in this process alone; plain pickle would succeed here
    and fail on the worker.
    """
    from vllm.transformers_utils.config import maybe_register_config_serialize_by_value

    maybe_register_config_serialize_by_value()
    data: bytes = cloudpickle.dumps(config, protocol=pickle.HIGHEST_PROTOCOL)
    return data


# --- placement ---


def _resources(on_cpu: bool, stages: int) -> tuple[dict[str, float], str]:
    """What one rank holds, and how ranks lie on nodes.

    A stage belongs on one node, which PACK does when ranks fill the GPUs of a node. Without GPUs nothing fills
    up, and stages exist to use several hosts: SPREAD lays an equal, contiguous share of the ranks on each.
    """
    if not on_cpu:
        return {"GPU": gpus_per_worker()}, "PACK"
    return {"CPU": 1.0}, "SPREAD" if stages > 1 else "PACK"


# --- checks ---


def _step_deadline() -> float | None:
    """RAYLESS_STEP_DEADLINE, else what vLLM was told, else the node's."""
    if "RAYLESS_STEP_DEADLINE" in os.environ or "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS" not in os.environ:
        return None
    return float(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)


def _refuse_unsupported(config: VllmConfig) -> None:
    multimodal = getattr(config.model_config, "multimodal_config", None)
    if getattr(multimodal, "mm_processor_cache_type", None) == "shm":
        raise ValueError(
            "--mm-processor-cache-type shm shares memory between the front end and every worker, which other nodes cannot\n"
            "hint: use --mm-processor-cache-type lru"
        )


def _group_name(config: VllmConfig) -> str:
    served = config.model_config.served_model_name
    name = served[0] if isinstance(served, list) else served
    return f"vllm:{name or config.model_config.model}"


def _model_folder(config: VllmConfig) -> str | None:
    """The model as a folder that every node must have; None when it is the name of a repository."""
    model = config.model_config.model
    return os.path.abspath(model) if os.path.isdir(model) else None
