"""How calls, replies and exceptions become bytes.

A call is pickled once and read by every rank. Plain pickle comes first: it is five to ten times quicker than
cloudpickle. What it cannot take (lambdas, closures) or would only name in ``__main__`` (which is another module in a
worker) goes by value, through cloudpickle.

Bytes are unpickled only when they came from the group's own keeper or driver: those are authenticated before the
first byte.
"""

from __future__ import annotations

import pickle
from typing import Any

PROTOCOL = 5
loads = pickle.loads


def dumps(value: object) -> bytes:
    """Raises what cloudpickle raises where the value cannot be pickled at all."""
    try:
        data = pickle.dumps(value, PROTOCOL)
    except Exception:  # whatever a `__reduce__` raises: cloudpickle has the last word
        return dumps_by_value(value)
    # A reference to __main__ means another module on the other side. A mere text of that name costs time only.
    return dumps_by_value(value) if b"__main__" in data else data


def dumps_by_value(value: object) -> bytes:
    """Through cloudpickle: classes and functions of ``__main__`` travel with their code."""
    import cloudpickle

    data: bytes = cloudpickle.dumps(value, protocol=PROTOCOL)
    return data


def dumps_exception(error: BaseException) -> bytes | None:
    """``None`` where it cannot be pickled, or not be read back."""
    try:
        data = dumps(error)
        return data if isinstance(loads(data), BaseException) else None
    except Exception:
        return None


def loads_exception(data: bytes | None) -> BaseException | None:
    """``None`` where it cannot be read here (its class may not exist on this side)."""
    if data is None:
        return None
    try:
        error = loads(data)
    except Exception:
        return None
    return error if isinstance(error, BaseException) else None


def method_name(method: Any) -> str:
    """For messages."""
    if isinstance(method, str):
        return method
    return getattr(method, "__qualname__", None) or repr(method)


def dumps_raised(method: str, error: BaseException) -> bytes:
    """The payload of a reply that says that a method raised."""
    import traceback

    # The first frames are the worker's own loop: no news to anybody.
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__") == "rayless._worker" and trace.tb_next:
        trace = trace.tb_next
    lines = traceback.format_exception(type(error), error, trace)
    name = type(error).__qualname__
    module = type(error).__module__
    if module not in ("builtins", "__main__"):
        name = f"{module}.{name}"
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be made)"
    return pickle.dumps((method, name, text, "".join(lines), dumps_exception(error)), PROTOCOL)
