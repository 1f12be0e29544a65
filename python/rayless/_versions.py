"""Versions of what must be the same on every rank, read from the names of the installed distributions.

``importlib.metadata`` would say the same and cost each worker 30 ms.
"""

from __future__ import annotations

import os
import sys

#: Distributions that are compared where both sides have them.
COMPARED = ("cloudpickle", "rayless", "torch", "transformers", "vllm")


def installed() -> dict[str, str]:
    """``python`` and each of :data:`COMPARED` that is found along ``sys.path``, to its version."""
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for name in names:
            if name.endswith(".dist-info"):
                distribution, _, version = name[: -len(".dist-info")].partition("-")
                if distribution in COMPARED:
                    found.setdefault(distribution, version)
    return found
