"""Runs inside the older root: two nodes, one group, and nothing left at the end."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
import tempfile


class Hosted:
    """A rank."""

    def add(self, a: int, b: int) -> tuple[int, str]:
        return a + b, platform.libc_ver()[1]


def rayless(run_dir: str, *words: str) -> str:
    done = subprocess.run(
        ["rayless", *words, "--run-dir", run_dir],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    if done.returncode != 0:
        sys.exit(f"rayless {' '.join(words)} ended with {done.returncode}: {done.stdout}")
    return done.stdout


def main() -> None:
    print(subprocess.run(["rayless", "--version"], check=True, capture_output=True, text=True).stdout.strip())
    import rayless as package

    print(f"glibc {platform.libc_ver()[1]}, Python {platform.python_version()}, module {package.__version__}")
    third, fourth = random.randrange(2, 250), random.randrange(2, 250)
    addresses = [f"127.{third}.{fourth}.{last}" for last in (1, 2)]
    with tempfile.TemporaryDirectory() as base:
        dirs = [os.path.join(base, name) for name in "ab"]
        common = ["--daemon", "--cpus", "2", "--gpus", "0"]
        try:
            rayless(dirs[0], "head", "--bind", addresses[0], "--name", "a", *common)
            token = os.path.join(dirs[0], "token")
            rayless(
                dirs[1],
                "join",
                f"{addresses[0]}:6379",
                "--bind",
                addresses[1],
                "--name",
                "b",
                "--token-file",
                token,
                *common,
            )
            os.environ["RAYLESS_RUN_DIR"] = dirs[0]
            with package.WorkerGroup.start(Hosted, 2, strategy="STRICT_SPREAD", wait=30) as group:
                assert [info.node_name for info in group.ranks] == ["a", "b"]
                assert group.call("add", 2, b=3) == [(5, platform.libc_ver()[1])] * 2
                print("two ranks on two nodes answer")
        finally:
            for folder in reversed(dirs):
                subprocess.run(["rayless", "stop", "--run-dir", folder], stdin=subprocess.DEVNULL, timeout=60)


if __name__ == "__main__":
    main()
