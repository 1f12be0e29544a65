"""``WorkerGroup``: one instance of a class per rank, on the nodes of the cluster, called together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rayless import _pickle, _rayless, _replies, _report, _runtime
from rayless._future import CallFuture

Bundle = Mapping[str, float]


class RankInfo:
    """One rank and where it runs."""

    __slots__ = ("address", "gpu_uuids", "gpus", "local_rank", "node_env", "node_id", "node_name", "pid", "rank")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        #: From 0 to the world size less one.
        self.rank: int = fields["rank"]
        #: Its place among the ranks of its node.
        self.local_rank: int = fields["local_rank"]
        #: Id of its node.
        self.node_id: str = fields["node_id"]
        #: Name of its node.
        self.node_name: str = fields["node_name"]
        #: IP address of its node.
        self.address: str = fields["address"]
        #: Indices of its GPUs on its node.
        self.gpus: list[int] = fields["gpus"]
        #: UUIDs of those.
        self.gpu_uuids: list[str] = fields["gpu_uuids"]
        #: Values of its node that win over the driver's environment.
        self.node_env: dict[str, str] = fields["node_env"]
        #: Its process on its node.
        self.pid: int = fields["pid"]

    def __repr__(self) -> str:
        return f"RankInfo(rank={self.rank}, node={self.node_name!r}, pid={self.pid}, gpus={self.gpus})"


class WorkerGroup:
    """A running group, made by :meth:`start`.

    Every call runs on every rank, in the order of the calls. A group belongs to the process that started it; it
    ends with ``stop()``, with that process, or with the first of its ranks or nodes that dies.
    """

    def __init__(
        self,
        native: _rayless.Group,
        runtime: _runtime.Runtime,
        steps: Iterable[str] = (),
        step_deadline: float | None = None,
    ) -> None:
        self._native = native
        deadline = native.step_deadline if step_deadline is None else step_deadline
        #: Method to the seconds that a call of it may take.
        self._deadlines = dict.fromkeys(steps, deadline) if deadline > 0 else {}
        self._pid = runtime.pid
        #: Id of the group, as ``rayless status`` shows it.
        self.id: str = native.id
        #: Where its ranks run, in ascending rank.
        self.ranks: list[RankInfo] = [RankInfo(fields) for fields in native.ranks()]
        self._all = tuple(range(len(self.ranks)))
        runtime.groups.add(self)

    @classmethod
    def start(
        cls,
        hosted: Callable[..., Any],
        n: int,
        *,
        bundles: Bundle | Sequence[Bundle] | None = None,
        strategy: str = "PACK",
        env: Mapping[str, str] | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        wait: float | None = None,
        name: str | None = None,
        rank_env: Sequence[Mapping[str, str]] | None = None,
        python: str | None = None,
        placement_group: str | None = None,
        start_timeout: float = 600,
        steps: Iterable[str] = (),
        step_deadline: float | None = None,
    ) -> WorkerGroup:
        """Starts ``n`` workers and in each an instance of ``hosted``: ``hosted(*args, **kwargs)``.

        ``bundles``: the resources of each rank, one mapping for all or one per rank; fractions are fine, and
        ``{"CPU": 1}`` is the default. ``strategy``: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD. ``env`` and ``rank_env``
        (one mapping per rank) come on top of this process's environment, see :mod:`rayless.environment`. ``wait``: seconds
        to wait for nodes and resources (default RAYLESS_WAIT, else 600; 0 refuses at once); meanwhile a table on stderr
        says what is short and who has it. ``python``: the interpreter of the workers, by default this one.
        ``placement_group``: id of a placement group to carve the bundles out of. ``start_timeout``: seconds for the workers
        to come up once they are placed, the run of ``hosted`` not included. ``steps``: names of methods that are known to
        be short. Where a call of one of them takes longer than ``step_deadline`` seconds (default RAYLESS_STEP_DEADLINE, else this
        node's ``--step-deadline``, 300; 0 for no limit) while no earlier call is under way, the group is ended with
        ``StepDeadlineError``. Other methods may take as long as they like; a call without progress for RAYLESS_STUCK_AFTER
        seconds (10) is reported on stderr, with where its ranks are.

        Raises ``PlacementError``, ``RefusedError`` and other ``LaunchError``, ``ClusterNotFoundError``, ``WorkerDiedError`` or
        ``NodeDiedError`` where one died meanwhile, and what ``hosted`` raised, as ``RayTaskError``. Whatever was started is
        ended then.
        """
        per_rank = _bundles(bundles, n)
        stuck_after = _seconds("RAYLESS_STUCK_AFTER", 10.0)
        if step_deadline is None and "RAYLESS_STEP_DEADLINE" in os.environ:
            step_deadline = _seconds("RAYLESS_STEP_DEADLINE", 0.0)
        elif step_deadline is not None and not step_deadline >= 0:
            raise ValueError(f"step_deadline={step_deadline} is not a time\nhint: seconds, 0 for no limit")
        if rank_env is not None and len(rank_env) != n:
            raise ValueError(f"rank_env has {len(rank_env)} mappings for {n} ranks\nhint: give one per rank")
        # First of all, so that what cannot be pickled is said before anything is started.
        first_call = _pickle.dumps_by_value((None, (hosted, tuple(args)), dict(kwargs or {})))
        runtime = _runtime.current()
        native = _rayless.start_group(
            run_dir=runtime.run_dir,
            name=name or _pickle.method_name(hosted),
            bundles=per_rank,
            strategy=strategy,
            placement_group=placement_group,
            wait=_wait(wait),
            versions=list(_versions().items()),
            program=python or sys.executable,
            arguments=[*_interpreter_flags(), "-m", "rayless._worker"],
            directory=_directory(),
            env=list(_environment(env).items()),
            rank_env=[list(each.items()) for each in rank_env or ()],
            boot=_boot(),
            start_timeout=start_timeout,
            log_to_driver=os.environ.get("RAYLESS_LOG_TO_DRIVER", "1").lower() not in ("0", "false", "no", "off"),
            stuck_after=stuck_after,
            report=_report.Reporter(),
        )
        group = cls(native, runtime, steps, step_deadline)
        try:
            native.run("__init__", first_call, None, None)
        except BaseException:
            group.stop()
            raise
        return group

    def call(
        self,
        method: str | Callable[..., Any],
        /,
        *args: Any,
        ranks: int | Iterable[int] | None = None,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Runs ``method`` on every rank and returns the results of ``ranks`` (all), in ascending rank.

        ``method``: a name, or a callable, which gets the instance first. ``ranks`` tells whose replies are waited for;
        all run it in any case.

        Raises what the method raised, as ``RayTaskError`` with its ``.rank`` (the first that is heard of, also from a rank
        that was not asked, while others are waited for); ``GetTimeoutError`` after ``timeout`` seconds: the group stays
        usable; ``ActorDiedError`` where the group is over; ``PendingCallsLimitExceeded`` for more than 64 calls at once.
        """
        name = method if type(method) is str else _pickle.method_name(method)
        asked = None if ranks is None else self._asked(ranks)
        payload = _pickle.dumps((method, args, kwargs))
        replies = self._native.run(name, payload, asked, timeout, self._deadlines.get(name))
        return _replies.results(self._all if asked is None else asked, name, replies)

    def call_async(
        self,
        method: str | Callable[..., Any],
        /,
        *args: Any,
        ranks: int | Iterable[int] | None = None,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> CallFuture:
        """As :meth:`call`, but returns a ``concurrent.futures.Future`` of the list at once.

        A future that is cancelled or forgotten changes nothing on the workers: the call keeps its place in the order.
        """
        name = method if type(method) is str else _pickle.method_name(method)
        asked = None if ranks is None else self._asked(ranks)
        payload = _pickle.dumps((method, args, kwargs))
        native = self._native.submit(name, payload, asked, timeout, self._deadlines.get(name))
        return CallFuture(native, name, self._all if asked is None else asked)

    def add_failure_callback(self, callback: Callable[[Exception], object]) -> None:
        """Calls ``callback`` with the ``ActorDiedError`` once, when the group fails (at once if it has); not on ``stop()``.

        It runs in a thread of rayless. What it raises is printed.
        """
        self._native.on_failure(callback)

    def links(self) -> list[dict[str, Any]]:
        """The tensor links between its ranks: the entries that it has in ``links`` of ``rayless status --json``.

        They come from the workers over the group's own sessions, so no daemon is asked. Of a group that failed they are
        those that there were then; a group that was stopped has none.
        """
        return self._native.links()

    def stop(self) -> None:
        """Ends the workers and returns when they are gone. Idempotent; does nothing in a forked child."""
        self._native.stop()

    @property
    def failure(self) -> Exception | None:
        """Why the group is over, if it failed."""
        return self._native.failure()

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def __len__(self) -> int:
        return len(self.ranks)

    def __repr__(self) -> str:
        return f"WorkerGroup(id={self.id!r}, world_size={len(self.ranks)})"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a WorkerGroup belongs to the process that started it and cannot be pickled")

    def _asked(self, ranks: int | Iterable[int]) -> tuple[int, ...]:
        asked = (ranks,) if isinstance(ranks, int) else tuple(sorted(set(ranks)))
        if asked and not (asked[0] >= 0 and asked[-1] < len(self.ranks)):
            wrong = asked[0] if asked[0] < 0 else asked[-1]
            raise ValueError(f"there is no rank {wrong}\nhint: the ranks of this group are 0 to {len(self.ranks) - 1}")
        return asked


def _bundles(bundles: Bundle | Sequence[Bundle] | None, n: int) -> list[list[tuple[str, float]]]:
    if n < 1:
        raise ValueError(f"a group of {n} workers makes no sense\nhint: n is the number of ranks, from 1")
    if bundles is None:
        bundles = {"CPU": 1}
    each = [bundles] * n if isinstance(bundles, Mapping) else list(bundles)
    if len(each) != n:
        raise ValueError(f"{len(each)} bundles for {n} ranks\nhint: give one per rank, or a single mapping for all")
    return [[(str(name), float(quantity)) for name, quantity in bundle.items()] for bundle in each]


def _wait(wait: float | None) -> float:
    if wait is not None:
        if not wait >= 0:
            raise ValueError(f"wait={wait} is not a time\nhint: seconds, 0 or more")
        return float(wait)
    return _seconds("RAYLESS_WAIT", 600.0)


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(f"{name}={text} is not a time\nhint: seconds, 0 or more")
    return seconds


def _directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        from rayless.exceptions import LaunchError

        raise LaunchError("the working directory of this process is gone\nhint: change to another one first") from None


def _versions() -> dict[str, str]:
    from rayless import _versions

    return _versions.installed()


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    from rayless import environment

    env = environment.forwarded(os.environ)
    env.update(extra or {})
    # The worker imports this package before it knows the driver's sys.path. Where only that path leads here (a checkout,
    # `sys.path.insert`), the environment has to.
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    on_path = [os.path.abspath(entry) for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if home not in on_path and os.path.basename(home) not in ("site-packages", "dist-packages"):
        env["PYTHONPATH"] = os.pathsep.join([home, *on_path])
    return env


def _boot() -> bytes:
    """What a worker applies before it unpickles anything of the user's."""
    path = [os.path.abspath(entry) for entry in sys.path]  # "" is the driver's working directory
    return _pickle.dumps({"sys_path": path, "argv": sys.argv})


def _interpreter_flags() -> list[str]:
    """``-O``, ``-W …``, ``-X …`` of this interpreter, as multiprocessing hands them on."""
    import subprocess

    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return flags
