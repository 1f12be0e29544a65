"""A daemon finds its GPUs through NVML, which takes a while, and is up before: over a stand-in for NVML, since most machines that run these tests have no
GPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import hosted
import rayless
from conftest import RAYLESS, environment, gone, groups_named
from netns import hosts
from serving import until

#: One GPU, which shows itself half a second after it was asked for.
NVML = """
#include <string.h>
#include <unistd.h>
int nvmlInit_v2(void) { usleep(500000); return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int error) { return "no error"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "1.2.3", size); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)1; return 0; }
int nvmlDeviceGetUUID(void *device, char *text, unsigned size) { strncpy(text, "GPU-stand-in", size); return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned size) { strncpy(text, "stand-in", size); return 0; }
"""
#: The kernel's own list of GPUs, in a mount namespace of the daemon's.
WITH_A_DRIVER = 'mount --make-rprivate / && mount --bind "$0" /proc/driver && exec "$@"'


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_restarted_daemon_knows_the_gpus_that_its_groups_hold_before_it_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RAYLESS
    (tmp_path / "nvml.c").write_text(NVML)
    library = tmp_path / "lib" / "libnvidia-ml.so.1"
    library.parent.mkdir()
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    (tmp_path / "driver" / "nvidia" / "gpus" / "0000:01:00.0").mkdir(parents=True)
    run_dir = tmp_path / "run"
    with hosts(1, loopback=True) as (host,):
        head = ["unshare", "--mount", "sh", "-c", WITH_A_DRIVER, str(tmp_path / "driver"), RAYLESS, "head", "--daemon"]
        head += ["--bind", host.address, "--cpus", "2", "--run-dir", str(run_dir)]
        found = {**environment(), "LD_LIBRARY_PATH": str(library.parent)}

        def start() -> int:
            with (tmp_path / "out").open("w") as out:  # a daemon must not hold the pipe of its starter
                subprocess.run(head, env=found, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=True)
            return int((run_dir / "daemon.pid").read_text().split()[0])

        monkeypatch.setenv("RAYLESS_RUN_DIR", str(run_dir))
        monkeypatch.setenv("RAYLESS_WAIT", "30")
        try:
            daemon = start()
            group = rayless.WorkerGroup.start(hosted.Plain, 2, bundles=[{"GPU": 0.5}] * 2, name="holds a GPU")
            pids = [info.pid for info in group.ranks]
            for _ in range(2):
                os.kill(daemon, signal.SIGKILL)
                assert gone([daemon])
                daemon = start()
                until(_all_known, 30, "the head knows the GPU and the group")
                (known,) = groups_named("holds a GPU")
                assert (known["state"], known["cause"]) == ("running", "")
                assert [worker["pid"] for worker in known["workers"]] == pids
                assert rayless.available_resources().get("GPU", 0.0) == 0.0
                assert len(group.call("add")) == 2
            group.stop()
        finally:
            rayless.shutdown()
            subprocess.run([RAYLESS, "stop", "--run-dir", str(run_dir)], check=False, capture_output=True)


def _all_known() -> bool:
    gpus = any(node["state"] == "alive" and node["gpus"] for node in rayless.status()["nodes"])
    return gpus and bool(groups_named("holds a GPU"))
