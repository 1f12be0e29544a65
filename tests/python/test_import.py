"""``import rayless`` is cheap, and the package says what it has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rayless

HEAVY = [
    "asyncio",
    "cloudpickle",
    "concurrent.futures",
    "dataclasses",
    "inspect",
    "json",
    "rayless._rayless",
    "threading",
    "typing",
]


def in_bare_interpreter(code: str) -> str:
    site = str(Path(rayless.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {site!r})\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_import_loads_nothing_heavy_and_starts_no_thread() -> None:
    loaded = in_bare_interpreter(
        f"before = set(sys.modules)\nimport rayless\nprint([name for name in {HEAVY} if name in sys.modules and name not in before])"
    )
    assert loaded == "[]"
    assert in_bare_interpreter("import rayless, os; print(len(os.listdir('/proc/self/task')))") == "1"


def test_every_public_name_is_there() -> None:
    for name in rayless.__all__:
        assert getattr(rayless, name) is not None
    assert set(rayless.__all__) <= set(dir(rayless))
    with pytest.raises(AttributeError, match="no attribute 'put_nothing'"):
        rayless.put_nothing  # type: ignore[attr-defined]  # noqa: B018


def test_the_command_comes_along() -> None:
    done = subprocess.run([sys.executable, "-m", "rayless", "--version"], capture_output=True, text=True, check=True)
    assert rayless.__version__ in done.stdout
