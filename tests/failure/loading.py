"""A worker of vLLM that stops before it loads its weights until a test lets it go on: `--worker-cls loading.LoadingWorker`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

#: Names the folder of the marks.
VARIABLE = "LOADING_MARKS"


class LoadingWorker(CPUWorker):
    """Leaves a mark when it is about to load, and waits for the mark `go`."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(os.environ[VARIABLE])
        (folder / f"load.{self.rank}").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        super().load_model(*args, **kwargs)
