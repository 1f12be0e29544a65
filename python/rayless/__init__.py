"""rayless: a few GPU hosts as one serving cluster.

    import rayless

    group = rayless.WorkerGroup.start(Model, 4, bundles={"GPU": 1})
    group.call("load", path)            # every rank runs it, in order; the replies come in ascending rank
    future = group.call_async("step", batch, ranks=[3])
    group.stop()

Importing this package starts nothing and loads nothing heavy: every name below comes from its module when it
is first used. Which names there are, and where they live, is the table ``_HOME``.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rayless import environment as environment
    from rayless import exceptions as exceptions
    from rayless import fabric as fabric
    from rayless._context import RuntimeContext as RuntimeContext
    from rayless._context import get_runtime_context as get_runtime_context
    from rayless._deferred import Deferred as Deferred
    from rayless._future import CallFuture as CallFuture
    from rayless._group import RankInfo as RankInfo
    from rayless._group import WorkerGroup as WorkerGroup
    from rayless._rayless import __version__ as __version__
    from rayless._runtime import available_resources as available_resources
    from rayless._runtime import cluster_resources as cluster_resources
    from rayless._runtime import init as init
    from rayless._runtime import is_initialized as is_initialized
    from rayless._runtime import nodes as nodes
    from rayless._runtime import shutdown as shutdown
    from rayless._runtime import status as status

#: Public name to the module that defines it ("" for a module of the package).
_HOME = {
    "CallFuture": "_future",
    "Deferred": "_deferred",
    "RankInfo": "_group",
    "RuntimeContext": "_context",
    "WorkerGroup": "_group",
    "__version__": "_rayless",
    "available_resources": "_runtime",
    "cluster_resources": "_runtime",
    "environment": "",
    "exceptions": "",
    "fabric": "",
    "get_runtime_context": "_context",
    "init": "_runtime",
    "is_initialized": "_runtime",
    "nodes": "_runtime",
    "shutdown": "_runtime",
    "status": "_runtime",
}

__all__ = [
    "CallFuture",
    "Deferred",
    "RankInfo",
    "RuntimeContext",
    "WorkerGroup",
    "__version__",
    "available_resources",
    "cluster_resources",
    "environment",
    "exceptions",
    "fabric",
    "get_runtime_context",
    "init",
    "is_initialized",
    "nodes",
    "shutdown",
    "status",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'rayless' has no attribute '{name}'")
    import importlib

    module = importlib.import_module(f"rayless.{home or name}")
    value = getattr(module, name) if home else module
    globals()[name] = value
    return value


def __dir__() -> "list[str]":
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
