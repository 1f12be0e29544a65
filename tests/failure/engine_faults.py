"""The faults of the engine cells: how each is made and undone, and what it must lead to."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine_stage import MOMENTS, EngineStage
from ground_faults import clear, nothing, restart, to_daemon, wire

KILL, STOP, CONT, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM


@dataclass(frozen=True)
class EngineFault:
    """`inject` makes it and returns when, on the monotonic clock; `undo` lets the stage be used again and returns when."""

    name: str
    text: str
    inject: Callable[[EngineStage], float]
    undo: Callable[[EngineStage], float]
    #: Whether the engine must end ("ends") or live on without one failed request ("lives").
    leads_to: str
    #: Who notices first.
    who: str
    #: What the group's cause must contain, one of them.
    line: tuple[str, ...] = ()
    #: The group's state in the end.
    state: str = "failed"
    #: What cannot end before the fault is undone (what is stopped, what is cut off).
    stays: tuple[str, ...] = ()
    #: Whether clients hear of it only once it is undone: the process that would tell them is the stopped one.
    mute: bool = False
    moments: tuple[str, ...] = MOMENTS
    #: Whether the whole machine has it: nothing else is played meanwhile.
    alone: bool = False
    #: Seconds for which a fault that the engine outlives lasts.
    lasts: float = 6.0


def _process(what: str, number: int) -> Callable[[EngineStage], float]:
    return lambda stage: stage.process(what).signal(number)


def _then(act: Callable[[EngineStage], object]) -> Callable[[EngineStage], float]:
    def change(stage: EngineStage) -> float:
        act(stage)
        return time.monotonic()

    return change


#: What nobody notices lasts from before the weights are loaded until the engine answers: a start under it is one cell.
LASTING = MOMENTS[1:]
#: How an end by silence reads, from whichever side noticed first.
SILENT = ("silent", "no sign of life", "nothing heard", "was reset", "lost the keeper", "broken pipe")

ENGINE_FAULTS = [
    EngineFault(
        "worker-kill-near",
        "SIGKILL of stage 0's worker, on the host of `vllm serve`",
        _process("worker@a", KILL),
        nothing,
        "ends",
        "its keeper (robust mutex, then pidfd)",
        ("SIGKILL",),
    ),
    EngineFault(
        "worker-kill-far",
        "SIGKILL of stage 1's worker, on the other host",
        _process("worker@b", KILL),
        nothing,
        "ends",
        "its keeper (robust mutex, then pidfd)",
        ("SIGKILL",),
    ),
    EngineFault(
        "worker-exit",
        "stage 1's worker is ended by SIGTERM",
        _process("worker@b", TERM),
        nothing,
        "ends",
        "its keeper (robust mutex, then pidfd)",
        ("SIGTERM",),
    ),
    EngineFault(
        "keeper-kill-near",
        "SIGKILL of the keeper on the host of `vllm serve`",
        _process("keeper@a", KILL),
        nothing,
        "ends",
        "EngineCore (session ends); workers by death signal",
        ("keeper",),
    ),
    EngineFault(
        "keeper-kill-far",
        "SIGKILL of the keeper on the other host",
        _process("keeper@b", KILL),
        nothing,
        "ends",
        "EngineCore (session ends); workers by death signal",
        ("keeper",),
    ),
    EngineFault(
        "keeper-stop-far",
        "SIGSTOP of the keeper on the other host",
        _process("keeper@b", STOP),
        _process("keeper@b", CONT),
        "ends",
        "EngineCore (silence)",
        SILENT,
        stays=("keeper@b", "worker@b", "helper"),
    ),
    EngineFault(
        "enginecore-kill",
        "SIGKILL of EngineCore",
        _process("EngineCore", KILL),
        nothing,
        "ends",
        "vLLM's front end (its child), the keepers (session ends)",
        ("driver",),
    ),
    EngineFault(
        "enginecore-stop",
        "SIGSTOP of EngineCore",
        _process("EngineCore", STOP),
        _process("EngineCore", CONT),
        "ends",
        "the keepers (silence); clients when it wakes",
        ("driver",),
        stays=("EngineCore", "api server", "helper"),
        mute=True,
    ),
    EngineFault(
        "api-kill",
        "SIGKILL of vLLM's API server",
        _process("api server", KILL),
        nothing,
        "ends",
        "EngineCore (its parent is gone), or the keepers with it",
        state="",
    ),
    EngineFault(
        "api-term",
        "SIGTERM of vLLM's API server: an orderly end",
        _process("api server", TERM),
        nothing,
        "ends",
        "vLLM's front end, which asks EngineCore to end",
        state="stopped",
        moments=("request", "idle"),
    ),
    EngineFault(
        "api-stop",
        "SIGSTOP of vLLM's API server for 6 s",
        _process("api server", STOP),
        _process("api server", CONT),
        "lives",
        "its clients, who wait",
    ),
    EngineFault(
        "daemon-kill",
        "SIGKILL of the node daemon on the other host, started again after 6 s",
        to_daemon("b", KILL),
        restart("b"),
        "lives",
        "the head; the engine does not notice",
    ),
    EngineFault(
        "daemon-stop",
        "SIGSTOP of the node daemon on the other host for 6 s",
        to_daemon("b", STOP),
        to_daemon("b", CONT),
        "lives",
        "the head (silence); the engine does not notice",
    ),
    EngineFault(
        "head-kill",
        "SIGKILL of the head, started again after 6 s",
        to_daemon("a", KILL),
        restart("a"),
        "lives",
        "the nodes; the engine does not notice",
    ),
    EngineFault(
        "head-stop",
        "SIGSTOP of the head for 6 s",
        to_daemon("a", STOP),
        to_daemon("a", CONT),
        "lives",
        "the nodes (silence); the engine does not notice",
    ),
    EngineFault(
        "cut",
        "the wire is cut",
        wire(cut=True),
        clear,
        "ends",
        "EngineCore and the keeper, each by silence",
        SILENT,
    ),
    EngineFault(
        "cut-from-driver",
        "one-way cut: what the host of `vllm serve` sends does not arrive",
        wire("ab", cut=True),
        clear,
        "ends",
        "the keeper (silence), then EngineCore",
        SILENT,
    ),
    EngineFault(
        "cut-to-driver",
        "one-way cut: what the other host sends does not arrive",
        wire("ba", cut=True),
        clear,
        "ends",
        "EngineCore (silence)",
        SILENT,
    ),
    EngineFault(
        "loss-5",
        "5 % of all packets lost, both ways",
        wire(loss=5),
        clear,
        "lives",
        "nobody",
        moments=LASTING,
        lasts=10,
    ),
    EngineFault(
        "loss-30",
        "30 % of all packets lost, both ways",
        wire(loss=30),
        clear,
        "lives",
        "nobody",
        moments=LASTING,
        lasts=20,
    ),
    EngineFault(
        "delay-200",
        "200 ms of delay each way, up to 50 ms more, some packets out of order",
        wire(delay=200, jitter=50, reorder=2),
        clear,
        "lives",
        "nobody",
        moments=LASTING,
        lasts=12,
    ),
    EngineFault(
        "flap",
        "the wire comes and goes: 1 s up, 1 s down",
        wire(flap="1000/1000"),
        clear,
        "lives",
        "nobody",
        moments=LASTING,
        lasts=12,
    ),
    EngineFault(
        "mtu-hole",
        "packets over 1300 bytes vanish without a word",
        wire(mtu=1300),
        clear,
        "ends",
        "EngineCore and the keeper, each by silence, once something long is sent",
        SILENT,
        moments=("request",),
    ),
    EngineFault(
        "disk-full",
        "the file system of the other host's run dir is full",
        _then(EngineStage.fill_disk),
        _then(EngineStage.empty_disk),
        "lives",
        "nobody",
        moments=LASTING,
    ),
    EngineFault(
        "clock-forward",
        "the wall clock of both daemons jumps an hour forward",
        _then(lambda stage: stage.set_clock(1)),
        _then(lambda stage: stage.set_clock(0)),
        "lives",
        "nobody",
        moments=LASTING,
    ),
    EngineFault(
        "clock-back",
        "the wall clock of both daemons jumps an hour back",
        _then(lambda stage: stage.set_clock(-1)),
        _then(lambda stage: stage.set_clock(0)),
        "lives",
        "nobody",
        moments=LASTING,
    ),
    EngineFault(
        "busy",
        "every core saturated for ten minutes (eight busy loops a core, at normal priority)",
        _then(EngineStage.make_busy),
        _then(EngineStage.make_quiet),
        "lives",
        "nobody",
        alone=True,
        lasts=600,
        moments=("request", "idle"),
    ),
]
BY_NAME = {fault.name: fault for fault in ENGINE_FAULTS}
