"""What a cell of either failure matrix is: a fault at a moment, and what was seen of it in all of its repeats."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar


@dataclass
class CellBase:
    """The part that both kinds share. Each adds what it measures: numbers that are counted, lists of times (`…_ms`), and lists of words."""

    fault: str
    moment: str

    #: Lists beside the times that have one entry for each repeat; others have each word once.
    EACH: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """As `--only` finds it."""
        return f"{self.fault}-{self.moment}"

    def add(self, other: CellBase) -> None:
        """What was seen in other repeats of the same cell."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, int):
                setattr(self, each.name, mine + theirs)
            elif each.name.endswith("_ms") or each.name in self.EACH:
                mine += theirs
            elif isinstance(mine, list):
                mine += [one for one in theirs if one not in mine]
