"""Workers of vLLM that stop on their way up until a test lets them go on: `--worker-cls loading.CpuWorker` or `loading.GpuWorker`.

They stop twice: before they take their device and meet each other ("start"), and before they load their weights ("load").
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

#: Names the folder of the marks.
VARIABLE = "LOADING_MARKS"


class Stops:
    """Leaves a mark where it stops, and waits for the mark that lets it go on."""

    rank: int

    def stop_at(self, where: str) -> None:
        folder = Path(os.environ[VARIABLE])
        (folder / f"{where}.{self.rank}").touch()
        while not (folder / f"{where}.go").exists():
            time.sleep(0.01)

    def init_device(self) -> None:
        self.stop_at("start")
        super().init_device()  # type: ignore[misc]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        self.stop_at("load")
        super().load_model(*args, **kwargs)  # type: ignore[misc]


def __getattr__(name: str) -> Any:
    """Each class when it is asked for: vLLM's build for CPUs cannot import the worker for GPUs."""
    if name == "CpuWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    elif name == "GpuWorker":
        from vllm.v1.worker.gpu_worker import Worker as Base
    else:
        raise AttributeError(name)
    made = globals()[name] = type(name, (Stops, Base), {"__module__": __name__})
    return made
