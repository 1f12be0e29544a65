"""What a rank hosts: vLLM's own worker, started in a few steps that the executor drives.

``inspect`` (is everything here?), ``boot`` (environment, imports, the rendezvous port), ``init_device``, ``open_links``
(between pipeline stages), ``load_model``; after that every request of the engine goes through ``run``. This module imports neither vLLM
nor torch: ``boot`` does, when the environment of the process is final.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayless._worker import current, doing
from rayless.exceptions import LinkError
from rayless.vllm import environment, pipeline
from rayless.vllm.placement import Plan
from rayless.vllm.preflight import Found, find

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from vllm.config import VllmConfig

    from rayless.vllm.pipeline import Pipeline

SHARED_MEMORY = Path("/dev/shm")


class Worker:
    """One rank of an engine."""

    #: vLLM picks its device out of all of the node's, by the configuration or by a variable set in :meth:`boot`.
    rayless_chooses_gpus = True

    def __init__(self, config: bytes, on_cpu: bool, pipeline: bool = False) -> None:
        self._config_bytes = config
        self._on_cpu = on_cpu
        #: Whether the pipeline's stages talk over links of ours.
        self._links_wanted = pipeline
        self._pipeline: Pipeline | None = None
        self._link_failure: LinkError | None = None
        self._plan: Plan
        self._config: VllmConfig
        self._worker: Any = None
        self._store: TCPStore | None = None
        self._async_output: type = type(None)
        self._reply_thread = threading.local()

    # --- start-up, in order ---

    def inspect(self, plans: list[Plan], model: str | None) -> Found:
        """Looks for vLLM and for the model's folder on this node; takes milliseconds."""
        self._plan = plans[int(os.environ["RAYLESS_RANK"])]
        return find(self._plan["node"], model)

    def boot(self) -> str | None:
        """Fixes the environment, imports vLLM and unpacks the configuration.

        On rank 0, returns the rendezvous URL of the group: the port is open, on this node's address only, and
        stays open until the group has formed, so nobody can take it in between.
        """
        plan = self._plan
        environment.prepare(
            os.environ,
            address=plan["address"],
            local_rank=plan["local_rank"],
            local_world_size=plan["local_world_size"],
            on_cpu=self._on_cpu,
        )
        if not self._on_cpu and not _assigns_gpus_by_config():
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, plan["gpus"]))
        rendezvous = self._open_rendezvous() if plan["rank"] == 0 else None

        from vllm.v1.outputs import AsyncModelRunnerOutput

        self._async_output = AsyncModelRunnerOutput
        self._config = pickle.loads(self._config_bytes)
        self._config_bytes = b""
        # Placement is ours, as it is Ray's under that name: the worker must neither shift its device by the
        # data-parallel rank nor expect the whole world on this node. This copy of the configuration is this
        # rank's alone, and nothing in a worker asks it for anything else.
        self._config.parallel_config.distributed_executor_backend = "ray"
        _configure_logging(self._config)
        return rendezvous

    def init_device(self, rendezvous: str) -> None:
        """Builds vLLM's worker and joins the process group of the engine."""
        plan = self._plan
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        parallel = self._config.parallel_config
        mine: dict[str, Any] = {
            "vllm_config": self._config,
            "local_rank": plan["device"] if plan["gpus"] else plan["local_rank"],
            "rank": plan["rank"],
            # On CPU, ranks with equal suffixes talk through shared memory, the others over the network.
            "distributed_init_method": f"{rendezvous}?node={plan['identity']}" if self._on_cpu else rendezvous,
            "is_driver_worker": plan["rank"] % parallel.tensor_parallel_size == 0,
        }
        if plan["gpus"] and _assigns_gpus_by_config():
            mine["assigned_physical_gpu_ids"] = plan["gpus"]
            _choose_network_device(self._config, plan)
        every: list[dict[str, Any]] = [{} for _ in range(plan["world_size"])]
        every[plan["rank"]] = mine
        if self._links_wanted:
            pipeline.prepare()
        self._worker = WorkerWrapperBase(rpc_rank=plan["rank"], global_rank=plan["rank"])
        self._worker.init_worker(every)
        self._worker.init_device()
        self._store = None  # the process group holds the port now
        _label_process(self._config)

    def open_links(self, timeout: float) -> None:
        """Opens the links to the neighbouring stages; every rank's groups have formed when this is called."""
        from vllm.distributed.parallel_state import get_pp_group

        self._pipeline = pipeline.open_links(
            get_pp_group(), self._worker.model_runner, rank=self._plan["rank"], timeout=timeout
        )

    def load_model(self) -> None:
        """Loads the weights of this stage; the whole group has formed when this is called."""
        self._forget_shared_names()
        from vllm.platforms import current_platform

        from vllm import envs

        self._worker.load_model()
        # Since 0.20 the block size follows from the attention backends, once these are known.
        if hasattr(current_platform, "update_block_size_for_backend"):
            current_platform.update_block_size_for_backend(self._config)
        envs.enable_envs_cache()

    # --- serving ---

    def run(self, request: bytes) -> Any:
        """Runs one request of the engine: a method of vLLM's worker, or a function that gets the worker."""
        method, args, kwargs, reply_rank = pickle.loads(request)
        doing(method if isinstance(method, str) else "a function of the engine")
        target = getattr(self._worker, method) if isinstance(method, str) else _bind(method, self._worker)
        if self._link_failure is not None:
            # What vLLM makes of a step whose first half failed is no answer.
            raise self._link_failure
        try:
            output = target(*args, **kwargs)
        except LinkError as error:
            self._link_failure = error
            pipeline.let_the_death_be_told(error)
            raise
        if reply_rank is not None and reply_rank != self._plan["rank"]:
            return None
        if isinstance(output, self._async_output):
            from rayless import Deferred

            # The next step must start while this one's tokens are still on their way from the device.
            return Deferred(lambda: self._finish(output))
        return output

    #: The same, for what has a deadline: the driver tells by the name.
    step = run

    def shutdown(self) -> None:
        """Lets go of devices and process groups, as vLLM's own launcher does at a regular end."""
        if self._worker is None:
            return
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

        worker, self._worker = self._worker, None
        if self._pipeline is not None:
            self._pipeline.close()
        worker.shutdown()
        destroy_model_parallel()
        destroy_distributed_environment()
        host = current()
        if host is not None:
            # Taking torch apart module by module takes seconds and frees nothing that the end of the process does not.
            host.leave_at_once = True

    # --- details ---

    def _finish(self, output: Any) -> Any:
        if not getattr(self._reply_thread, "ready", False):
            # A new thread starts on device 0 and would open a context there.
            from vllm.platforms import current_platform

            device = getattr(self._worker, "device", None)
            if device is not None and not self._on_cpu:
                current_platform.set_device(device)
            self._reply_thread.ready = True
        return output.get_output()

    def _open_rendezvous(self) -> str:
        from torch.distributed import TCPStore

        host = self._plan["address"]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((host, 0))
        listener.listen(max(128, 2 * self._plan["world_size"]))
        port = listener.getsockname()[1]
        # torch would listen on every interface; given a socket, it listens on ours. `multi_tenant` lets
        # init_process_group find this store again by its port.
        self._store = TCPStore(
            host_name=host,
            port=port,
            world_size=self._plan["world_size"],
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listener.detach(),
        )
        return f"tcp://[{host}]:{port}" if family == socket.AF_INET6 else f"tcp://{host}:{port}"

    def _forget_shared_names(self) -> None:
        """Unlinks the names of the CPU backend's shared memory, which every rank has mapped by now.

        The memory lives as long as it is mapped; without a name, nothing is left behind by a rank that is
        killed.
        """
        identity = os.environ.get("VLLM_DIST_IDENT")
        if not self._on_cpu or not identity:
            return
        for path in SHARED_MEMORY.iterdir():
            if path.name.startswith(f"{identity}-") and "cpushm" in path.name:
                path.unlink(missing_ok=True)


def _bind(method: bytes, worker: Any) -> Callable[..., Any]:
    import cloudpickle

    function = cloudpickle.loads(method)
    return lambda *args, **kwargs: function(worker, *args, **kwargs)


def _assigns_gpus_by_config() -> bool:
    """Whether this vLLM takes a worker's GPUs from its configuration (0.25 and newer), and not from
    CUDA_VISIBLE_DEVICES. Read from the source: importing vLLM would already look at the variable."""
    spec = find_spec("vllm")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        source = Path(folder) / "config" / "parallel.py"
        if source.is_file():
            return "assigned_physical_gpu_ids" in source.read_text(encoding="utf-8")
    return False


def _choose_network_device(config: VllmConfig, plan: Plan) -> None:
    """VLLM_GPU_NIC_PCIE_MAPPING, in the versions that have it."""
    from vllm.platforms.interface import set_assigned_physical_gpu_ids

    set_assigned_physical_gpu_ids(plan["gpus"])
    try:
        from vllm.v1.executor.vllm_net_devices import set_worker_net_device
    except ImportError:
        return
    set_worker_net_device(plan["device"], config)


def _configure_logging(config: VllmConfig) -> None:
    """Level and format as the front end was told; up to vLLM 0.25 importing it is enough."""
    chosen = getattr(config, "logging_config", None)
    if chosen is not None:
        from vllm.logger import configure_logging

        configure_logging(chosen)


def _label_process(config: VllmConfig) -> None:
    """The title of the process and the prefix of its log lines, as under vLLM's own launcher."""
    from vllm.v1.executor.multiproc_executor import WorkerProc

    label = getattr(WorkerProc, "setup_proc_title_and_log_prefix", None)
    if label is not None:
        label(enable_ep=config.parallel_config.enable_expert_parallel)
