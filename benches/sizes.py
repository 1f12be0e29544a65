"""Sizes of the wheel and the command, and what it costs to start them cold.

    python benches/sizes.py WHEEL [--runs 55]

``rayless --version`` as a whole process; ``import rayless`` as the time of a bare interpreter with the import less the time of one without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path


def wall_ms(command: list[str], runs: int) -> list[float]:
    """Milliseconds of each run."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter_ns()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append((time.perf_counter_ns() - begin) / 1e6)
    return times


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--runs", type=int, default=55)
    options = parser.parse_args()
    rayless = shutil.which("rayless")
    if rayless is None:
        sys.exit("no `rayless` on PATH\nhint: run it through `make bench`")
    version = wall_ms([rayless, "--version"], options.runs)
    true = wall_ms(["/bin/true"], options.runs)
    bare, imported = [], []
    for _ in range(options.runs):
        bare += wall_ms([sys.executable, "-c", "pass"], 1)
        imported += wall_ms([sys.executable, "-c", "import rayless"], 1)
    print(
        json.dumps(
            {
                "wheel_bytes": options.wheel.stat().st_size,
                "command_bytes": os.stat(rayless).st_size,
                "version_ms": round(statistics.median(version), 2),
                "floor_true_ms": round(statistics.median(true), 2),
                "import_ms": round(statistics.median(imported) - statistics.median(bare), 2),
                "n": options.runs,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
