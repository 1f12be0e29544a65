"""What the process of a rank sees in its environment.

A worker gets the driver's environment minus a published list, and the values of its own node win; that is
the work of :mod:`rayless`. What is left to decide here concerns vLLM alone, and has to be in place before
torch is imported: threads, visible devices, and variables that describe another process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence

#: Variables that describe one process of a launcher; those of the driver mean nothing on another rank.
PER_PROCESS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_DIST_IDENT", "VLLM_HOST_PORT")


def flag(name: str) -> bool:
    """Whether a switch such as RAYLESS_DEFAULT is on."""
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")


def gpus_per_worker() -> float:
    """RAYLESS_GPUS_PER_WORKER: the share of a GPU that each worker holds (default 1).

    Raises ``ValueError`` for anything but a number in (0, 1].
    """
    text = os.environ.get("RAYLESS_GPUS_PER_WORKER", "1")
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(
            f"RAYLESS_GPUS_PER_WORKER={text} is not a share of a GPU\n"
            "hint: give a number above 0 and up to 1; a rank uses one device"
        )
    return share


def prepare(
    environ: MutableMapping[str, str],
    *,
    address: str,
    local_rank: int,
    local_world_size: int,
    on_cpu: bool,
) -> None:
    """Completes the environment of this process, before it imports torch. A value set by hand wins."""
    for name in PER_PROCESS:
        environ.pop(name, None)
    environ.setdefault("VLLM_HOST_IP", address)
    # GPU numbers of the inventory are NVML's, which follow the PCI bus; CUDA's own order need not.
    environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    cpus = sorted(os.sched_getaffinity(0))
    for name, value in threads(environ, cpus, local_rank, local_world_size, on_cpu=on_cpu).items():
        environ.setdefault(name, value)


def threads(
    environ: Mapping[str, str],
    cpus: Sequence[int],
    local_rank: int,
    local_world_size: int,
    *,
    on_cpu: bool,
) -> dict[str, str]:
    """OpenMP settings of one of ``local_world_size`` ranks that share ``cpus``.

    vLLM's own launcher computes these on the driver's host for the driver's host; here every node does it for
    itself. ``VLLM_CPU_OMP_THREADS_BIND`` keeps its meaning: ``nobind``, or one list of cores per local rank
    (``0-3|4-7``); its default ``auto`` gives each rank an equal share without pinning.
    """
    share = max(1, len(cpus) // max(1, local_world_size))
    binding = environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    if not on_cpu or binding == "auto":
        return {"OMP_NUM_THREADS": str(share)}
    if binding == "nobind":
        return {}
    lists = binding.split("|")
    if local_rank >= len(lists):
        raise ValueError(
            f"VLLM_CPU_OMP_THREADS_BIND={binding} has {len(lists)} lists of cores, and this node runs {local_world_size} ranks\n"
            "hint: give one list per rank of a node, separated by |"
        )
    cores = parse_cores(lists[local_rank])
    return {
        "OMP_NUM_THREADS": str(len(cores)),
        "OMP_PLACES": "{" + ",".join(map(str, cores)) + "}",
        "OMP_PROC_BIND": "true",
    }


def parse_cores(text: str) -> list[int]:
    """``"0-2,5"`` as ``[0, 1, 2, 5]``."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return sorted(cores)
