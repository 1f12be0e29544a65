"""Every cell of the failure matrix: it is noticed, torn down without leftovers and comes back, or the group lives on. How long each
took is recorded by `matrix.py`; here only a hang is a failure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from faults import Fault
from matrix import cells, play, summary
from stage import Hang, Stage


@pytest.mark.parametrize(
    ("fault", "moment"),
    [
        pytest.param(
            fault, moment, id=f"{fault.name}-{moment}", marks=[pytest.mark.quick] if moment in fault.quick else []
        )
        for fault, moment in cells()
    ],
)
def test_cell(stages: Callable[..., Stage], fault: Fault, moment: str, request: pytest.FixtureRequest) -> None:
    stage = stages()
    try:
        cell = play(stage, fault, moment, repeats=1)
    except Hang as hang:
        logs = request.config.rootpath / "target" / "failure-logs" / f"{fault.name}-{moment}"
        stage.keep_logs(logs)
        stages(give_up=True)
        pytest.fail(f"{hang}; logs are in {logs}")
    except BaseException:
        stages(give_up=True)
        raise
    print(summary(cell))
    if cell.problems or cell.left:
        stages(give_up=True)
    assert not cell.problems
    assert not cell.left
    for line in cell.lines:
        assert not fault.line or any(word in line for word in fault.line), line
