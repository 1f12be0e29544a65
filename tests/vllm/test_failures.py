"""Twelve engine cells of the failure matrix (the rest: `tests/failure/engines.py`, in `make test-long`): what ends an engine is told to its client, to
/health and to the head, with one cause, and leaves nothing; what an engine must outlive costs no request. One engine serves all cells that
it outlives, and is hit in the end. Two more cells are in `test_engines.py`, under other engines: a worker killed in the middle of a request, and the
head killed and started again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / "failure"), str(TESTS / "wire")]

from engine_cells import EngineCell, play, summary
from engine_faults import BY_NAME
from engine_stage import CLOCK_LIBRARY, EngineStage

from wire import unavailable

#: In this order: engines are shared by what they outlive.
CELLS = [
    ("daemon-kill", "request"),
    ("head-kill", "idle"),
    ("loss-5", "request"),
    ("flap", "request"),
    ("disk-full", "request"),
    ("clock-forward", "request"),
    ("clock-back", "idle"),
    ("cut", "request"),
    ("keeper-kill-far", "idle"),
    ("enginecore-kill", "request"),
    ("api-kill", "request"),
    ("worker-kill-near", "loading"),
]


@pytest.fixture(scope="module")
def stages() -> Iterator[list[EngineStage]]:
    """The stage, in a list: a cell that goes wrong throws it away, and the next one makes another."""
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    held: list[EngineStage] = []
    yield held
    for stage in held:
        stage.close()


@pytest.mark.parametrize(("name", "moment"), CELLS, ids=[f"{name}-{moment}" for name, moment in CELLS])
def test_cell(stages: list[EngineStage], name: str, moment: str, request: pytest.FixtureRequest) -> None:
    if name.startswith("clock") and not CLOCK_LIBRARY.exists():
        pytest.skip("libfaketime is not installed (apt-get install faketime)")
    if not stages:
        stages.append(EngineStage())
    stage = stages[0]
    cell = EngineCell(name, moment)
    try:
        play(stage, BY_NAME[name], moment, cell)
    except BaseException as error:
        cell.problems.append(f"{type(error).__name__}: {error}")
        raise
    finally:
        print(summary(cell))
        if cell.problems or cell.left:
            stage.keep_logs(request.config.rootpath / "target" / "failure-logs" / f"engine-{name}-{moment}")
            stages.clear()
            stage.close()
    assert not cell.problems
    assert not cell.left
