"""What needs no cluster: names, environments, plans, checks."""

from __future__ import annotations

import concurrent.futures
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from rayless import Deferred
from rayless.vllm import environment
from rayless.vllm.preflight import Found, compare, find
from rayless.vllm.worker import Worker


def rank(number: int, node: str, gpus: list[int] | None = None) -> SimpleNamespace:
    return SimpleNamespace(rank=number, node_id=f"id-{node}", node_name=node, address="10.0.0.1", gpus=gpus or [])


class TestName:
    """`--distributed-executor-backend rayless` and its two switches."""

    @pytest.fixture(autouse=True)
    def _no_switches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RAYLESS_DEFAULT", "RAYLESS_AS_RAY"):
            monkeypatch.delenv(name, raising=False)

    def test_resolves_to_the_class(self) -> None:
        from rayless.vllm.executor import RaylessExecutor
        from rayless.vllm.plugin import resolve

        assert resolve("rayless") is RaylessExecutor

    @pytest.mark.parametrize("other", [None, "mp", "ray", "uni", "some.module.Executor"])
    def test_other_names_are_left_alone(self, other: str | None) -> None:
        from rayless.vllm.plugin import resolve

        assert resolve(other) == other

    def test_as_ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from rayless.vllm.executor import RaylessExecutor
        from rayless.vllm.plugin import resolve

        monkeypatch.setenv("RAYLESS_AS_RAY", "1")
        assert resolve("ray") is RaylessExecutor
        assert resolve("mp") == "mp"

    def test_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from rayless.vllm.executor import RaylessExecutor
        from rayless.vllm.plugin import resolve

        monkeypatch.setenv("RAYLESS_DEFAULT", "1")
        assert resolve(None) is RaylessExecutor
        assert resolve("mp") == "mp"
        assert resolve(None, nnodes=2) is None, "vLLM's own multi-node launch was asked for"

    @pytest.mark.parametrize("named", ["rayless", "ray", None])
    def test_engine_arguments_pass_vllms_checks_with_stages(
        self, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, named: str | None
    ) -> None:
        """The whole way of `vllm serve`: parser, engine arguments, configuration, executor class."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.executor.abstract import Executor

        from rayless.vllm.executor import RaylessExecutor

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("RAYLESS_AS_RAY", "1")
        monkeypatch.setenv("RAYLESS_DEFAULT", "1")
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        flags = ["--model", str(models["llama"]), "--pipeline-parallel-size", "2", "--max-model-len", "256"]
        if named is not None:
            flags += ["--distributed-executor-backend", named]
        config = AsyncEngineArgs.from_cli_args(parser.parse_args(flags)).create_engine_config()
        assert Executor.get_class(config) is RaylessExecutor
        assert not config.parallel_config.use_ray
        restored = pickle.loads(pickle.dumps(config))
        assert Executor.get_class(restored) is RaylessExecutor


class TestEnvironment:
    def test_another_processs_variables_go_and_the_nodes_stay(self) -> None:
        environ = {"LOCAL_RANK": "3", "MASTER_ADDR": "10.9.9.9", "VLLM_HOST_IP": "10.0.0.7", "HF_HOME": "/models"}
        environment.prepare(environ, address="10.0.0.2", local_rank=0, local_world_size=1, on_cpu=True)
        assert "LOCAL_RANK" not in environ
        assert "MASTER_ADDR" not in environ
        assert environ["VLLM_HOST_IP"] == "10.0.0.7"
        assert environ["HF_HOME"] == "/models"

    def test_ranks_of_a_node_share_its_cores(self) -> None:
        assert environment.threads({}, range(8), 1, 2, on_cpu=True) == {"OMP_NUM_THREADS": "4"}
        assert environment.threads({}, range(2), 0, 8, on_cpu=False) == {"OMP_NUM_THREADS": "1"}

    def test_cores_given_by_hand_are_pinned_per_local_rank(self) -> None:
        given = {"VLLM_CPU_OMP_THREADS_BIND": "0-2|4,6"}
        assert environment.threads(given, range(8), 1, 2, on_cpu=True) == {
            "OMP_NUM_THREADS": "2",
            "OMP_PLACES": "{4,6}",
            "OMP_PROC_BIND": "true",
        }
        with pytest.raises(ValueError, match="hint: give one list per rank"):
            environment.threads(given, range(8), 2, 3, on_cpu=True)

    def test_nobind_sets_nothing(self) -> None:
        assert environment.threads({"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, range(8), 0, 1, on_cpu=True) == {}

    @pytest.mark.parametrize("wrong", ["0", "-1", "2", "many", "nan"])
    def test_a_share_of_a_gpu_is_checked(self, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAYLESS_GPUS_PER_WORKER", wrong)
        with pytest.raises(ValueError, match="hint:"):
            environment.gpus_per_worker()

    def test_a_share_of_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAYLESS_GPUS_PER_WORKER", "0.25")
        assert environment.gpus_per_worker() == 0.25


class TestPlans:
    def test_two_hosts_of_two_gpus(self) -> None:
        from rayless.vllm.placement import describe, make_plans

        ranks = [rank(0, "a", [2]), rank(1, "a", [5]), rank(2, "b", [0]), rank(3, "b", [1])]
        plans = make_plans(ranks, "g")
        assert [plan["gpus"] for plan in plans] == [[2, 5], [2, 5], [0, 1], [0, 1]]
        assert [plan["device"] for plan in plans] == [0, 1, 0, 1]
        assert [plan["local_rank"] for plan in plans] == [0, 1, 0, 1]
        assert len({plan["identity"] for plan in plans}) == 2
        assert describe(plans, 2) == [
            "pipeline stage 0: ranks 0-1 on node a (10.0.0.1, GPU 2,5)",
            "pipeline stage 1: ranks 2-3 on node b (10.0.0.1, GPU 0,1)",
        ]

    def test_ranks_that_share_a_gpu(self) -> None:
        from rayless.vllm.placement import make_plans

        plans = make_plans([rank(0, "a", [3]), rank(1, "a", [3])], "g")
        assert [(plan["gpus"], plan["device"], plan["local_rank"]) for plan in plans] == [([3], 0, 0), ([3], 0, 1)]

    def test_a_stage_on_two_nodes_is_told(self) -> None:
        from rayless.vllm.placement import describe, make_plans

        assert "spans 2 nodes" in describe(make_plans([rank(0, "a"), rank(1, "b")], "g"), 2)[1]


class TestChecks:
    GOOD: ClassVar[Found] = {
        "node": "node a",
        "python": "3.11.7",
        "vllm": "0.32.0",
        "torch": "2.13.0",
        "model_missing": False,
    }

    def refused(self, **changed: Any) -> str:

        other: Any = {**self.GOOD, "node": "node b", **changed}
        with pytest.raises(RuntimeError) as caught:
            compare([self.GOOD, other], "/models/tiny")
        return str(caught.value)

    def test_equals_pass(self) -> None:

        compare([self.GOOD, {**self.GOOD, "node": "node b", "python": "3.11.2"}], "/models/tiny")

    def test_a_node_without_vllm(self) -> None:
        assert self.refused(vllm=None).splitlines() == [
            "node b has no vLLM for Python 3.11.7",
            "hint: install vllm==0.32.0 there, in the same environment as here",
        ]

    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            ({"vllm": "0.31.0"}, "vLLM differs: 0.32.0 on node a, 0.31.0 on node b"),
            ({"torch": "2.12.0"}, "torch differs: 2.13.0 on node a, 2.12.0 on node b"),
            ({"python": "3.12.1"}, "Python differs: 3.11 on node a, 3.12 on node b"),
        ],
    )
    def test_versions_must_agree(self, changed: dict[str, str], told: str) -> None:
        cause, hint = self.refused(**changed).splitlines()
        assert cause == told
        assert hint.startswith("hint: ")

    def test_a_missing_model(self) -> None:
        cause, hint = self.refused(model_missing=True).splitlines()
        assert cause == "node b has no folder /models/tiny"
        assert "node b" in hint

    def test_what_is_here_is_found_without_importing_it(self) -> None:
        import vllm

        found = find("here", "/nowhere")
        assert found["vllm"] == vllm.__version__ or found["vllm"] is not None
        assert found["model_missing"]


class TestReplies:
    def test_an_asynchronous_output_is_fetched_beside_the_loop_and_on_the_asked_rank_only(self) -> None:
        class Output:
            fetched = 0

            def get_output(self) -> str:
                Output.fetched += 1
                return "tokens"

        worker = Worker(b"", on_cpu=True)
        worker._plan = {"rank": 1}  # type: ignore[typeddict-item]
        worker._async_output = Output
        worker._worker = SimpleNamespace(sample_tokens=lambda _grammar: Output())
        asked = worker.run(pickle.dumps(("sample_tokens", (None,), {}, 1)))
        assert type(asked) is Deferred
        assert Output.fetched == 0
        assert asked.resolve() == "tokens"
        assert worker.run(pickle.dumps(("sample_tokens", (None,), {}, 0))) is None
        assert Output.fetched == 1

    def test_a_function_gets_the_worker(self) -> None:
        import cloudpickle

        worker = Worker(b"", on_cpu=True)
        worker._plan = {"rank": 0}  # type: ignore[typeddict-item]
        worker._worker = SimpleNamespace(device="cpu")
        function = cloudpickle.dumps(lambda hosted, suffix: hosted.device + suffix)
        assert worker.run(pickle.dumps((function, (":0",), {}, None))) == "cpu:0"

    def test_aggregators_see_all_replies_once(self) -> None:
        """With a KV connector every rank replies, and each aggregator changes what it is given."""
        from rayless.vllm.executor import RaylessExecutor

        sent: list[Any] = []

        class Group:
            def call_async(self, method: str, request: bytes, *, ranks: Any, timeout: Any) -> Any:
                sent.append((method, pickle.loads(request), ranks, timeout))
                done: concurrent.futures.Future[list[list[str]]] = concurrent.futures.Future()
                done.set_result([["rank 0"], ["rank 1"]])
                return done

        class Aggregator:
            def aggregate(self, outputs: list[list[str]], output_rank: int) -> list[str]:
                outputs[output_rank].append(outputs[1 - output_rank][0])
                return outputs[output_rank]

        executor = object.__new__(RaylessExecutor)
        executor._cause, executor._group, executor._output_rank = None, Group(), 1
        executor.kv_output_aggregator = Aggregator()
        executor.ec_output_aggregator = None
        future = executor.execute_model("step", non_block=True)
        assert future.done()
        assert future.result() == ["rank 1", "rank 0"]
        assert future.result() == ["rank 1", "rank 0"]
        method, (name, args, _kwargs, reply_rank), ranks, timeout = sent[0]
        # Under this name, so that the group's deadline for steps holds for it.
        assert (method, name, args, reply_rank, ranks) == ("step", "execute_model", ("step",), None, None)
        assert timeout is None

    def test_the_failure_callback_comes_once_and_calls_fail_with_the_cause(self) -> None:
        import threading

        from rayless.vllm.executor import RaylessExecutor, _failure_callback

        executor = object.__new__(RaylessExecutor)
        executor._cause, executor._callback, executor._closed = None, None, False
        executor._lock = threading.Lock()
        told: list[str] = []
        executor.register_failure_callback(lambda: told.append("first"))
        failed = _failure_callback(executor)
        failed(RuntimeError("rank 1 on node b was killed by signal 9"))
        failed(RuntimeError("rank 0 on node a was killed by signal 9"))
        assert told == ["first"]
        with pytest.raises(RuntimeError, match="rank 1 on node b"):
            executor.collective_rpc("check_health")
        executor.register_failure_callback(lambda: told.append("late"))
        assert told == ["first", "late"]


class TestEnding:
    """A front end gives EngineCore the time to stop its group, and no more."""

    class Process:
        """Ends by nothing."""

        pid = 77
        asked = False

        def __init__(self) -> None:
            self.sentinel, self._other = os.pipe()

        def is_alive(self) -> bool:
            return True

        def terminate(self) -> None:
            self.asked = True

    def test_it_goes_on_when_the_group_is_stopped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from rayless.vllm import ending

        process, states = self.Process(), ["running", "running", "stopped"]

        def status() -> dict[str, Any]:
            state = states.pop(0) if len(states) > 1 else states[0]
            # Before the process is asked to end, only what runs is counted.
            assert state != "stopped" or process.asked
            return {"groups": [{"state": state, "driver": {"pid": 77}}, {"state": "running", "driver": {"pid": 78}}]}

        monkeypatch.setattr("rayless.status", status, raising=False)
        ending._end([process])  # type: ignore[list-item]
        assert process.asked
        assert states == ["stopped"]

    def test_it_does_not_hang_with_the_daemon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from rayless.vllm import ending

        monkeypatch.setattr("rayless.status", threading.Event().wait, raising=False)
        monkeypatch.setattr(ending, "SECONDS", 0.1)
        process = self.Process()
        ending._end([process])  # type: ignore[list-item]
        assert process.asked

    def test_an_engine_does_not_outlive_its_front_end(self) -> None:
        """Three processes: this one looks on, the second is killed, the third was its EngineCore."""
        script = (
            "import multiprocessing as m, os, sys, time\n"
            "def core(pipe):\n"
            "    from rayless.vllm.ending import end_with_front_end\n"
            "    end_with_front_end()\n"
            "    pipe.send(os.getpid())\n"
            "    time.sleep(600)\n"
            "if __name__ == '__main__':\n"
            "    near, far = m.Pipe()\n"
            "    m.get_context('spawn').Process(target=core, args=(far,), name='EngineCore').start()\n"
            "    print(near.recv(), flush=True)\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "front_end.py")
            file.write_text(script)
            done = subprocess.run([sys.executable, str(file)], capture_output=True, timeout=60)
        assert done.returncode == -9
        # The pipes were read to their ends, which a core that lived on would keep open.
        assert b"front end is gone" in done.stderr

    def test_only_a_front_end_that_would_give_no_time_is_changed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.v1.engine.utils import CoreEngineProcManager

        from rayless.vllm import ending

        given: list[float | None] = []
        ended: list[object] = []
        monkeypatch.setattr(CoreEngineProcManager, "shutdown", lambda self, timeout=None: given.append(timeout))
        monkeypatch.setattr(ending, "_end", ended.append)
        ending.let_engines_end()
        ending.let_engines_end()
        manager = SimpleNamespace(processes="them", _request_shutdown_timeout=0)
        draining = SimpleNamespace(processes="them", _request_shutdown_timeout=30)
        for one, timeout in ((manager, 0), (manager, None), (draining, 0), (draining, 12.5)):
            CoreEngineProcManager.shutdown(one, timeout=timeout)
        assert given == [0, None, 0, 12.5]
        assert ended == ["them"]


def test_a_configuration_of_remote_code_travels_with_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """--trust-remote-code makes classes in `transformers_modules`, which no other process can import."""
    from rayless.vllm.executor import _pickled_config

    module = ModuleType("transformers_modules")
    exec(
        "class RemoteConfig:\n    hidden_size = 0\n    def doubled(self):\n        return 2 * self.hidden_size",
        module.__dict__,
    )
    monkeypatch.setitem(sys.modules, "transformers_modules", module)
    config = module.RemoteConfig()
    config.hidden_size = 21
    elsewhere = "import pickle, sys; print(pickle.load(sys.stdin.buffer).doubled())"
    done = subprocess.run([sys.executable, "-c", elsewhere], input=_pickled_config(config), capture_output=True)
    assert done.stdout.strip() == b"42", done.stderr.decode()
