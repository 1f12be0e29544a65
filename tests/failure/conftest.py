"""One stage for all cells, a new one after a cell that went wrong."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stage import Stage

from wire import unavailable


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: played by `make test` (the rest: `make test-long`)")


@pytest.fixture(scope="session")
def stages() -> Iterator[Callable[[bool], Stage]]:
    """Gives the stage; `stages(True)` gives it up."""
    if reason := unavailable():
        pytest.skip(reason)
    if shutil.which("rayless") is None:
        pytest.exit("no `rayless` on PATH\nhint: run these tests through `make test-failure`", returncode=2)
    held: list[Stage] = []

    def stage(give_up: bool = False) -> Stage:
        if give_up:
            held.pop().close()
        elif not held:
            held.append(Stage())
        return held[0] if held else None  # type: ignore[return-value]

    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [each.close() for each in held])
        yield stage
