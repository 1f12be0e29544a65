"""What a driver makes of the bytes that a worker replied."""

from __future__ import annotations

from typing import Any

from rayless import _pickle
from rayless.exceptions import RaySystemError, RayTaskError, as_instance_of_cause


def raised(rank: int, where: str, payload: bytes) -> Exception:
    """What the caller raises where the method raised."""
    method, name, text, trace, cause = _pickle.loads(payload)
    return as_instance_of_cause(RayTaskError(rank, method, name, text, trace, _pickle.loads_exception(cause), where))


def results(ranks: tuple[int, ...], method: str, payloads: list[bytes]) -> list[Any]:
    """The results of the asked ranks; ``RaySystemError`` where one cannot be read here."""
    return [_result(rank, method, payload) for rank, payload in zip(ranks, payloads, strict=True)]


def _result(rank: int, method: str, payload: bytes) -> Any:
    try:
        return _pickle.loads(payload)
    except Exception as error:
        raise RaySystemError(
            f"the reply of rank {rank} to `{method}` cannot be unpickled here: {type(error).__name__}: {error}\n"
            "hint: the class of the result must be importable on the driver, too"
        ) from error
