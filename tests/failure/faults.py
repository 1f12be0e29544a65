"""The faults of the matrix: how each is made and undone, and what it must lead to."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from ground_faults import clear, nothing, restart, to_daemon, wire
from stage import Process, Stage

#: Where a fault finds the group.
MOMENTS = ("idle", "start", "call")


@dataclass(frozen=True)
class Fault:
    """`inject` makes it and returns when, on the monotonic clock; `undo` lets the stage be used again and returns when."""

    name: str
    text: str
    inject: Callable[[Stage], float]
    undo: Callable[[Stage], float]
    #: Whether the group must end ("ends"), must live on ("lives"), or one call must time out and the group live ("stuck").
    leads_to: str
    #: Who notices first.
    who: str
    #: What the line of cause must contain, one of them.
    line: tuple[str, ...] = ()
    #: Seconds before which nobody may give up.
    not_before: float = 0.0
    #: Processes of the group that cannot end before the fault is undone (what is stopped, what is cut off).
    stays: tuple[str, ...] = ()
    moments: tuple[str, ...] = MOMENTS
    #: Seconds for which a fault that the group outlives lasts.
    lasts: float = 6.0
    #: Bytes of the tensors that the ranks exchange after every tenth call while it lasts, 0 for none.
    tensor: int = 0
    #: Repeats in the whole matrix.
    repeats: int = 10
    #: Moments at which it is seconds that are waited for and measured, so that several repeats may be played at once (`--lanes`).
    waits: tuple[str, ...] = ()
    #: Played by `make test` too, at these moments.
    quick: tuple[str, ...] = ()


def _to_group(pick: Callable[[Stage], Process], number: int) -> Callable[[Stage], float]:
    return lambda stage: pick(stage).signal(number)


def _continue(pick: Callable[[Stage], Process]) -> Callable[[Stage], float]:
    return lambda stage: pick(stage).signal(signal.SIGCONT)


def _driver(number: int) -> Callable[[Stage], float]:
    def inject(stage: Stage) -> float:
        at = stage.driver.process.signal(number)
        if number == signal.SIGKILL:
            stage.driver.process.gone(5)
        return at

    return inject


def _driver_leaves(stage: Stage) -> float:
    at = time.monotonic()
    stage.driver.do("leave")
    return at


def _new_driver(stage: Stage) -> float:
    stage.new_driver()
    return time.monotonic()


def _worker(host: str) -> Callable[[Stage], Process]:
    return lambda stage: stage.worker(host)


def _keeper(host: str) -> Callable[[Stage], Process]:
    return lambda stage: stage.keeper(host)


def _busy(stage: Stage) -> float:
    stage.make_busy()
    return time.monotonic()


def _quiet(stage: Stage) -> float:
    stage.make_quiet()
    return time.monotonic()


def _fill(stage: Stage) -> float:
    stage.fill_disk()
    return time.monotonic()


def _empty(stage: Stage) -> float:
    stage.empty_disk()
    return time.monotonic()


KILL, STOP, CONT = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT
ON_A = ("keeper@a", "worker@a")
ON_B = ("keeper@b", "worker@b")

FAULTS = [
    Fault(
        "worker-kill-near",
        "SIGKILL of a worker on the driver's host",
        _to_group(_worker("a"), KILL),
        nothing,
        "ends",
        "its keeper (robust mutex, then pidfd)",
        ("killed", "SIGKILL", "signal 9"),
        quick=("idle", "start", "call"),
    ),
    Fault(
        "worker-kill-far",
        "SIGKILL of a worker on the other host",
        _to_group(_worker("b"), KILL),
        nothing,
        "ends",
        "its keeper (robust mutex, then pidfd)",
        ("killed", "SIGKILL", "signal 9"),
        quick=("call",),
    ),
    Fault(
        "worker-exit-near",
        "a worker on the driver's host ends with code 3",
        Stage.go,
        nothing,
        "ends",
        "its keeper (robust mutex, then pidfd)",
        ("3",),
        moments=("call",),
        quick=("call",),
    ),
    Fault(
        "worker-exit-far",
        "a worker on the other host ends with code 3",
        Stage.go,
        nothing,
        "ends",
        "its keeper (robust mutex, then pidfd)",
        ("3",),
        moments=("call",),
    ),
    Fault(
        "worker-stop",
        "SIGSTOP of a worker (stuck for ever, alive to the kernel)",
        _to_group(_worker("b"), STOP),
        _continue(_worker("b")),
        "stuck",
        "the caller's timeout",
        moments=("idle",),
        waits=("idle",),
    ),
    Fault(
        "keeper-kill-near",
        "SIGKILL of the keeper on the driver's host",
        _to_group(_keeper("a"), KILL),
        nothing,
        "ends",
        "the driver (session ends); workers by death signal",
        ("keeper",),
        quick=("call",),
    ),
    Fault(
        "keeper-kill-far",
        "SIGKILL of the keeper on the other host",
        _to_group(_keeper("b"), KILL),
        nothing,
        "ends",
        "the driver (session ends); workers by death signal",
        ("keeper",),
        quick=("call",),
    ),
    Fault(
        "keeper-stop-near",
        "SIGSTOP of the keeper on the driver's host",
        _to_group(_keeper("a"), STOP),
        _continue(_keeper("a")),
        "ends",
        "the driver (silence, and the kernel says that it is stopped)",
        ("stopped",),
        stays=ON_A,
        not_before=2.0,
        waits=MOMENTS,
    ),
    Fault(
        "keeper-stop-far",
        "SIGSTOP of the keeper on the other host",
        _to_group(_keeper("b"), STOP),
        _continue(_keeper("b")),
        "ends",
        "the driver (silence, and the node's daemon says that it is stopped)",
        ("stopped",),
        stays=ON_B,
        not_before=2.0,
        waits=MOMENTS,
    ),
    Fault(
        "daemon-kill",
        "SIGKILL of the node daemon on the other host, started again after a while",
        to_daemon("b", KILL),
        restart("b"),
        "lives",
        "the head; the group does not notice",
        quick=("call",),
        waits=("idle", "start"),
    ),
    Fault(
        "daemon-stop",
        "SIGSTOP of the node daemon on the other host for 6 s",
        to_daemon("b", STOP),
        to_daemon("b", CONT),
        "lives",
        "the head (silence); the group does not notice",
        waits=("idle", "start"),
    ),
    Fault(
        "head-kill",
        "SIGKILL of the head, started again after a while",
        to_daemon("a", KILL),
        restart("a"),
        "lives",
        "the nodes; the group does not notice",
        quick=("call",),
        waits=("idle", "start"),
    ),
    Fault(
        "head-stop",
        "SIGSTOP of the head for 6 s",
        to_daemon("a", STOP),
        to_daemon("a", CONT),
        "lives",
        "the nodes (silence); the group does not notice",
        waits=("idle", "start"),
    ),
    Fault(
        "driver-kill",
        "SIGKILL of the driver",
        _driver(KILL),
        _new_driver,
        "ends",
        "the keepers (session ends, pidfd)",
        quick=("call",),
    ),
    Fault(
        "driver-exit",
        "the driver ends without stopping its group",
        _driver_leaves,
        _new_driver,
        "ends",
        "the keepers (session ends, pidfd)",
    ),
    Fault(
        "driver-stop",
        "SIGSTOP of the driver",
        _driver(STOP),
        _driver(CONT),
        "ends",
        "the keepers (silence)",
        waits=MOMENTS,
    ),
    Fault(
        "cut",
        "the wire is cut",
        wire(cut=True),
        clear,
        "ends",
        "driver and keeper, each by silence",
        ("silent", "nothing heard", "no sign"),
        quick=("call",),
        waits=MOMENTS,
    ),
    Fault(
        "cut-from-driver",
        "one-way cut: what the driver's host sends does not arrive",
        wire("ab", cut=True),
        clear,
        "ends",
        "the keeper (silence), then the driver",
        quick=("call",),
        waits=MOMENTS,
    ),
    Fault(
        "cut-to-driver",
        "one-way cut: what the other host sends does not arrive",
        wire("ba", cut=True),
        clear,
        "ends",
        "the driver (silence)",
        waits=MOMENTS,
    ),
    Fault(
        "loss-5",
        "5 % of all packets lost, both ways",
        wire(loss=5),
        clear,
        "lives",
        "nobody",
        lasts=15,
        waits=MOMENTS,
    ),
    Fault(
        "loss-30",
        "30 % of all packets lost, both ways",
        wire(loss=30),
        clear,
        "lives",
        "nobody",
        lasts=60,
        waits=MOMENTS,
    ),
    Fault(
        "delay-200",
        "200 ms of delay each way, up to 50 ms more, some packets out of order",
        wire(delay=200, jitter=50, reorder=2),
        clear,
        "lives",
        "nobody",
        lasts=20,
        waits=MOMENTS,
    ),
    Fault(
        "flap",
        "the wire comes and goes: 1 s up, 1 s down",
        wire(flap="1000/1000"),
        clear,
        "lives",
        "nobody",
        lasts=20,
        waits=MOMENTS,
    ),
    Fault(
        "mtu-hole",
        "packets over 1300 bytes vanish without a word",
        wire(mtu=1300),
        clear,
        "ends",
        "driver and keeper, each by silence, once something long is sent",
        moments=("call",),
        waits=("call",),
    ),
    Fault(
        "busy",
        "every core saturated (eight busy loops a core, at normal priority)",
        _busy,
        _quiet,
        "lives",
        "nobody",
        lasts=600,
        tensor=256 * 1024,
        waits=MOMENTS,
    ),
    Fault(
        "disk-full",
        "the file system of the other host's run dir is full",
        _fill,
        _empty,
        "lives",
        "nobody",
        quick=("start",),
        waits=("idle", "start"),
    ),
]
