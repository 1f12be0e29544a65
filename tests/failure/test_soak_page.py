"""What the soak calls growth."""

from __future__ import annotations

import pytest
from soak_page import Looks, Size, generations, growth

pytestmark = pytest.mark.quick


def looks(since: int, until: int, memory: float = 0.0, fds: int = 20) -> Looks:
    """One each three seconds of a process that gains `memory` KB a second."""
    return [(float(at), Size(1500 + int(memory * (at - since)), 20_000 + at, fds, 2)) for at in range(since, until, 3)]


def test_what_grows_within_a_part_is_named_and_what_differs_between_parts_is_not() -> None:
    head = [*looks(100, 200, fds=20), *looks(200, 1000, fds=22)]
    leaks = looks(200, 1000, memory=4)
    young = looks(900, 1000, memory=1000)
    rows, problems = growth({("head", 1): head, ("daemon@b", 2): leaks, ("keeper@a", 3): young}, 0, 200, 1000)
    assert [(row["process"], row["part"]) for row in rows] == [("head", 2), ("daemon@b", 2)]
    assert len(problems) == 1
    assert problems[0].startswith("daemon@b (pid 2): memory of its own, KB: ")


def test_the_last_of_a_kind_must_not_be_larger_than_the_first() -> None:
    seen = {("keeper@a", pid): looks(60 * pid, 60 * pid + 30, fds=24 + pid // 3) for pid in range(12)}
    seen |= {("keeper@b", pid): looks(60 * pid, 60 * pid + 30) for pid in range(12)}
    rows, problems = generations(seen)
    assert [(row["process"], row["lives"]) for row in rows] == [("keeper@a", 12), ("keeper@b", 12)]
    assert problems == ["keeper@a: the first had 24 descriptors, the last 27"]
