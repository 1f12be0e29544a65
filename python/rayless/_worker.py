"""A worker: ``python -m rayless._worker``, started by a keeper, one per rank.

It applies what the driver said of its interpreter, hosts one instance of the driver's class and runs the group's calls
one after the other, in the order in which the driver made them.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
from typing import TYPE_CHECKING, Any

from rayless import _pickle, _rayless, _versions
from rayless._deferred import Deferred

if TYPE_CHECKING:
    import queue


def main() -> None:
    """Runs until the group is over."""
    faulthandler.enable()
    # Ctrl-C in the driver's terminal is the driver's to handle: it stops the group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        # A pipe is block-buffered by default: its lines would come late, and the last ones never.
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    worker = _rayless.Worker()
    _offer_stacks()
    _boot(worker.boot())
    global _host
    _host = Host(worker)
    worker.ready(list(_versions.installed().items()))
    _host.run()
    if _host.leave_at_once:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)


_host: Host | None = None


def current() -> Host | None:
    """The worker that this process is, if it is one."""
    return _host


def _offer_stacks() -> None:
    """Lets the keeper have the stacks of all threads, whatever they are in: the handler is C and needs no lock of Python's."""
    descriptor, number = map(int, os.environ.pop("RAYLESS_STACKS").split(","))
    os.set_inheritable(descriptor, False)
    faulthandler.register(number, file=descriptor, all_threads=True, chain=False)


def doing(text: str) -> None:
    """Notes what this rank is in, for the line that the driver prints when nothing moves; counts as progress.

    The name of the running method is noted by itself. Nothing happens in a process that is no worker.
    """
    if _host is not None:
        _host.native.doing(text)


def _boot(blob: bytes) -> None:
    boot = pickle.loads(blob)
    own = [path for path in sys.path if path not in boot["sys_path"]]
    sys.path[:] = [*boot["sys_path"], *own]
    sys.argv[:] = boot["argv"]


def _show_gpus(hosted: Any) -> None:
    """Lets CUDA see this rank's GPUs only, as Ray does. Left alone: a value given by ``env=``, and classes that choose devices themselves."""
    gpus = os.environ.get("RAYLESS_GPU_IDS")
    if gpus and not getattr(hosted, "rayless_chooses_gpus", False):
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", gpus)


class Host:
    """The instance and the loop around it."""

    def __init__(self, worker: _rayless.Worker) -> None:
        self._worker = worker
        self._instance: Any = None
        self._later: Later | None = None
        #: Id of the call that runs, or ran last: the same on every rank, and greater with every call.
        self.call = 0
        #: Whether the process may end without taking the interpreter apart: what it hosted has let go of everything.
        self.leave_at_once = False

    @property
    def native(self) -> _rayless.Worker:
        """This rank, as the native module has it."""
        return self._worker

    def run(self) -> None:
        """Until the group is over, or a method leaves by ``SystemExit``."""
        while (call := self._worker.next_call()) is not None:
            self._handle(*call)
            del call  # its payload may be large, and the next call far away
        if self._later is not None:
            self._later.drain()

    def _handle(self, call: int, asked: bool, payload: bytes) -> None:
        name = "(a call that cannot be unpickled)"
        self.call = call
        try:
            method, args, kwargs = pickle.loads(payload)
            name = _pickle.method_name(method) if method is not None else "__init__"
            self._worker.doing(name)
            result = self._invoke(method, args, kwargs)
            if type(result) is Deferred:
                if asked:
                    self._defer(call, name, result)
                    return
                result = None
            reply = _pickle.dumps(result) if asked else b""
        except SystemExit:
            raise
        except BaseException as error:  # KeyboardInterrupt too: it came out of the method, not from a terminal
            self._raised(call, asked, name, error)
        else:
            self._reply(call, False, reply)

    def _invoke(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if type(method) is str:
            return getattr(self._instance, method)(*args, **kwargs)
        if method is None:
            hosted, hosted_args = args
            _show_gpus(hosted)
            self._instance = hosted(*hosted_args, **kwargs)
            return None
        return method(self._instance, *args, **kwargs)

    def _raised(self, call: int, asked: bool, name: str, error: BaseException) -> None:
        if not asked:
            # The driver hears of it only while it waits for other ranks; the log keeps it in any case.
            import traceback

            traceback.print_exception(type(error), error, error.__traceback__)
        self._reply(call, True, _pickle.dumps_raised(name, error))

    def _defer(self, call: int, name: str, result: Deferred[Any]) -> None:
        if self._later is None:
            self._later = Later(self._worker)
        self._later.put(call, name, result)

    def _reply(self, call: int, raised: bool, payload: bytes) -> None:
        # Replies keep the order of their calls: behind one that is still being made, all wait.
        if self._later is None or not self._later.put_behind(call, raised, payload):
            self._worker.reply(call, raised, payload)


class Later:
    """The thread that resolves ``Deferred`` results, in order."""

    def __init__(self, worker: _rayless.Worker) -> None:
        import queue
        import threading

        self._worker = worker
        self._queue: queue.SimpleQueue[tuple[int, Any, Any] | None] = queue.SimpleQueue()
        self._owed = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="rayless-deferred", daemon=True)
        self._thread.start()

    def put(self, call: int, name: str, result: Deferred[Any]) -> None:
        """``result`` becomes the reply to ``call``."""
        with self._lock:
            self._owed += 1
        self._queue.put((call, name, result))

    def put_behind(self, call: int, raised: bool, payload: bytes) -> bool:
        """Queues a reply that is ready, if any before it is not; ``False`` where there is none."""
        with self._lock:
            if self._owed == 0:
                return False
            self._owed += 1
        self._queue.put((call, raised, payload))
        return True

    def drain(self) -> None:
        """Waits for what is queued."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            call, what, result = entry
            try:
                if type(result) is Deferred:
                    raised, payload = self._resolve(what, result)
                else:
                    raised, payload = what, result
                self._worker.reply(call, raised, payload)
            except BaseException as error:  # the keeper is gone, or `SystemExit` out of `resolve`
                print(f"rayless: rank {self._worker.rank} ends: {error}", file=sys.stderr)
                os._exit(1)
            with self._lock:
                self._owed -= 1

    def _resolve(self, name: str, result: Deferred[Any]) -> tuple[bool, bytes]:
        try:
            return False, _pickle.dumps(result.resolve())
        except SystemExit:
            raise
        except BaseException as error:
            return True, _pickle.dumps_raised(name, error)


if __name__ == "__main__":
    # `__main__` is what drivers pickle their own classes from; ours must be found under its own name.
    from rayless import _worker

    _worker.main()
