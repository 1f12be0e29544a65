"""The cluster that ``init(local=True)`` starts: one node on a loopback address, with a run dir of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping

from rayless import _binary
from rayless.exceptions import LaunchError

_LOOPBACK = "127.0.0.1"


class LocalCluster:
    """A head of its own; ``stop`` ends it and removes its folder."""

    def __init__(self, cpus: float | None, gpus: float | None, resources: Mapping[str, float] | None) -> None:
        try:
            self._program = _binary.find()
        except FileNotFoundError as error:
            raise LaunchError(str(error)) from None
        self.run_dir = tempfile.mkdtemp(prefix="rayless-local-")
        words = ["head", "--daemon", "--bind", _LOOPBACK, "--port", "0"]
        if cpus is not None:
            words += ["--cpus", f"{cpus:g}"]
        if gpus is not None:
            words += ["--gpus", f"{gpus:g}"]
        for name, quantity in (resources or {}).items():
            words += ["--resource", f"{name}={quantity:g}"]
        done = self._run(*words)
        if done.returncode != 0:
            shutil.rmtree(self.run_dir, ignore_errors=True)
            raise LaunchError(f"the local cluster did not start: {done.stderr.strip() or done.returncode}")

    def stop(self) -> None:
        """Idempotent."""
        if os.path.isdir(self.run_dir):
            self._run("stop")
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        # The token of another cluster is none of this one's.
        env = {name: value for name, value in os.environ.items() if name not in ("RAYLESS_TOKEN", "RAYLESS_TOKEN_FILE")}
        command = [self._program, words[0], "--run-dir", self.run_dir, *words[1:]]
        # Its output goes to files, not pipes: a daemon that kept a pipe open would keep its starter waiting.
        with tempfile.TemporaryFile("w+") as errors:
            done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
            errors.seek(0)
            return subprocess.CompletedProcess(command, done.returncode, "", errors.read())
