"""What every node must have before weights are loaded, found in milliseconds without importing any of it."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict


class Found(TypedDict):
    """What a node has, found without importing any of it."""

    node: str
    python: str
    vllm: str | None
    torch: str | None
    model_missing: bool


def find(node: str, model: str | None) -> Found:
    """What this process could import, and whether the model's folder exists; imports nothing."""
    return {
        "node": node,
        "python": ".".join(map(str, sys.version_info[:3])),
        "vllm": _version("vllm"),
        "torch": _version("torch"),
        "model_missing": model is not None and not Path(model).is_dir(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        spec = find_spec(package)
        # A folder of that name on the path is no package: it has no origin.
        return "of unknown version" if spec and spec.origin else None


def compare(found: Sequence[Found], folder: str | None) -> None:
    """Raises one line of cause and a hint unless every node can run what this one runs."""
    first = found[0]
    for other in found:
        if other["vllm"] is None:
            raise RuntimeError(
                f"{other['node']} has no vLLM for Python {other['python']}\n"
                f"hint: install vllm=={first['vllm']} there, in the same environment as here"
            )
    for key, what in (("vllm", "vLLM"), ("torch", "torch"), ("python", "Python")):
        for other in found:
            mine, theirs = str(first.get(key)), str(other.get(key))
            if key == "python":  # pickles travel between patch releases
                mine, theirs = mine.rpartition(".")[0], theirs.rpartition(".")[0]
            if mine != theirs:
                raise RuntimeError(
                    f"{what} differs: {mine} on {first['node']}, {theirs} on {other['node']}\n"
                    f"hint: install the same {what} on every node that runs a rank"
                )
    missing = list(dict.fromkeys(other["node"] for other in found if other["model_missing"]))
    if missing:
        raise RuntimeError(
            f"{missing[0]} has no folder {folder}\n"
            f"hint: put the model at the same path on {', '.join(missing)}, or serve it by its repository name"
        )
