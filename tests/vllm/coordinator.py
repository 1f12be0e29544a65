"""vLLM's own pipeline group (``GroupCoordinator``) over links between workers, without a model.

    python tests/vllm/coordinator.py [--stages 2] [--tensor 1] [--transport tcp|shm|rdma]

runs all of it on the cluster that RAYLESS_RUN_DIR names and prints one line of JSON: what each end says of its links,
and what was sent through torch.distributed meanwhile. It fails where a byte is wrong. `test_coordinator.py` starts it on two hosts;
any other cluster does as well, such as one in a guest with RDMA devices.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import rayless

#: Rounds of the busy part: as many steps as a sender may be ahead.
ROUNDS = 40
LARGE = 8 << 20


class Stage:
    """One rank: vLLM's groups, and rayless's links under the pipeline's."""

    def build(self, rendezvous: str, tensor: int, stages: int) -> None:
        """Forms vLLM's process groups as a worker does, with nothing of ours in them."""
        from rayless.vllm import pipeline

        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        pipeline.prepare()
        rank = int(os.environ["RAYLESS_RANK"])
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(tensor * stages, rank, rendezvous, local_rank=rank, backend="gloo")
            initialize_model_parallel(tensor, stages, backend="gloo")
        self.rank, self.pp, self.tp = rank, get_pp_group(), get_tp_group()

    def open(self, tokens: bool) -> bool:
        """Opens the links; gives whether ``PPHandler``'s group stayed away."""
        from rayless.vllm import pipeline
        from rayless.vllm.pipeline.tokens import SiblingGroup

        self.runner = Runner() if tokens else object()
        self.links = pipeline.open_links(self.pp, self.runner, rank=self.rank, timeout=60)
        sibling = self.pp.make_sibling_device_group(group_desc="pp_broadcast")
        self.calls = count_collectives()
        return isinstance(sibling, SiblingGroup)

    def relay(self, number: int, wait: bool) -> None:
        """One step: takes the dict of the stage before, compares it, and hands it on."""
        values = values_of(number)
        if not self.pp.is_first_rank:
            received, handles, joins = self.pp.irecv_tensor_dict(all_gather_group=self.tp)
            for handle in handles:
                handle.wait()
            for join in joins:
                join()
            compare(received, values)
        if not self.pp.is_last_rank:
            handles = self.pp.isend_tensor_dict(values, all_gather_group=self.tp)
            assert handles[0].is_completed(), "the first handle is the metadata's"
            self.sent = handles[1:]
            if wait:
                for handle in handles:
                    handle.wait()

    def many(self, rounds: int) -> None:
        """The first stage runs ahead of the others as far as the links let it."""
        for number in range(rounds):
            self.relay(number, wait=False)

    def blocking(self, number: int) -> None:
        """The calls that vLLM 0.15 makes."""
        values = values_of(number)
        if not self.pp.is_first_rank:
            compare(self.pp.recv_tensor_dict(all_gather_group=self.tp), values)
        if not self.pp.is_last_rank:
            self.pp.send_tensor_dict(values, all_gather_group=self.tp)

    def tokens(self, rounds: int) -> None:
        """The V1 runner's broadcast of sampled tokens: sent at once, received when the next step needs them."""
        for number in range(rounds):
            self.runner.step(number, self.pp)

    def crossed(self) -> str:
        """The second stage asks one call too late; gives what it was told."""
        if self.pp.is_first_rank:
            return ""
        from rayless.exceptions import LinkLostError

        try:
            _, handles, _ = self.pp.irecv_tensor_dict(all_gather_group=self.tp)
            for handle in handles:
                handle.wait()
        except LinkLostError as error:
            return str(error)
        return ""

    def send_one(self) -> None:
        """A step that the second stage does not take part in."""
        if self.pp.is_first_rank:
            self.pp.isend_tensor_dict(values_of(0), all_gather_group=self.tp)

    def report(self) -> dict[str, Any]:
        """What crossed the links, and what crossed torch.distributed since they were opened: nothing, and then one barrier."""
        self.pp.barrier()
        ends = [self.links.hop._before, self.links.hop._after]
        if self.links.tokens is not None:
            ends += [*self.links.tokens._senders, self.links.tokens._receiver]
        links = [end.link.report() | {"counters": end.link.counters()} for end in ends if end is not None]
        return {"rank": self.rank, "links": links, "torch": dict(self.calls)}


class Runner:
    """The part of vLLM's V1 runner that sends sampled tokens, taken from the installed release."""

    use_async_scheduling = True

    def __init__(self) -> None:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        for name in ("_pp_broadcast_prev_sampled_token_ids", "_pp_receive_prev_sampled_token_ids_to_input_batch"):
            setattr(self, name, getattr(GPUModelRunner, name).__get__(self))
        self.input_batch = InputBatch()
        self.requests: dict[str, Any] = {}
        self.device = "cpu"
        self.discard_request_mask = InputBatch.mask()
        self._pp_recv_work: Any = None
        self.expected: Any = None

    def _is_all_reqs_chunked_prefill(self) -> bool:
        return False

    def step(self, number: int, pp: Any) -> None:
        """As ``execute_model`` and ``sample_tokens`` do: needs the tokens of the step before, then makes those of this one."""
        import torch

        if pp.is_last_rank:
            sampled = torch.arange(number, number + 4, dtype=torch.int32).reshape(4, 1)
            self._pp_broadcast_prev_sampled_token_ids(sampled)
            return
        if self._pp_recv_work is not None:
            self._pp_recv_work.wait()
            self._pp_recv_work = None
        if self.expected is not None:
            assert torch.equal(self.input_batch.prev_sampled_token_ids, self.expected)
        self._pp_receive_prev_sampled_token_ids_to_input_batch()
        self.expected = torch.arange(number, number + 4, dtype=torch.int32).reshape(4, 1)


class InputBatch:
    """Four requests."""

    num_reqs = 4
    req_ids = ("a", "b", "c", "d")

    def __init__(self) -> None:
        import numpy

        self.is_token_ids = numpy.zeros((4, 1 << 12), dtype=bool)
        self.num_tokens_no_spec = numpy.zeros(4, dtype=numpy.int64)
        self.prev_sampled_token_ids: Any = None

    @staticmethod
    def mask() -> Any:
        """None of them is discarded."""
        import numpy

        class Mask:
            np = numpy.zeros(4, dtype=bool)

        return Mask


def values_of(number: int) -> dict[str, Any]:
    """What step ``number`` carries: every form of tensor that vLLM's stages send, and other values."""
    import torch

    made = torch.Generator().manual_seed(number)
    tokens = number % 5  # a step of no tokens is among them
    values: dict[str, Any] = {
        "hidden_states": torch.randn(tokens, 64, generator=made).bfloat16(),
        "residual": torch.randn(tokens, 64, generator=made),
        "ids": torch.randint(0, 1 << 40, (3,), generator=made),
        "mask": torch.rand(7, generator=made) > 0.5,
        "scale": torch.tensor(0.5 + number),
        "number": number,
    }
    if number % 20 == 7:
        values["large"] = torch.full((LARGE,), number % 251, dtype=torch.uint8)
    return values


def compare(received: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises unless both hold the same, bit for bit."""
    import torch

    assert set(received) == set(expected), (set(received), set(expected))
    for name, value in expected.items():
        got = received[name]
        if isinstance(value, torch.Tensor):
            assert (got.dtype, got.shape) == (value.dtype, value.shape), (name, got.dtype, got.shape)
            assert torch.equal(got, value), name
        else:
            assert got == value, name


def count_collectives() -> collections.Counter[str]:
    """Counts, from now on, each message that this process gives to a process group of torch's."""
    from torch.distributed import ProcessGroup

    calls: collections.Counter[str] = collections.Counter()
    for name in ("send", "recv", "recv_anysource", "broadcast", "allreduce", "allgather", "_allgather_base", "barrier"):
        original = getattr(ProcessGroup, name)

        def counted(self: Any, *args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
            calls[_name] += 1
            return _original(self, *args, **kwargs)

        setattr(ProcessGroup, name, counted)
    return calls


def run(stages: int, tensor: int, transport: str | None = None) -> dict[str, Any]:
    """Everything, on the cluster at hand."""
    if transport is not None:
        os.environ["RAYLESS_TRANSPORT"] = transport
    world = stages * tensor
    with tempfile.TemporaryDirectory(prefix="rayless-pp-", dir="/var/tmp") as folder:
        path = str(Path(__file__).parent)
        group = rayless.WorkerGroup.start(
            Stage, world, bundles=[{"CPU": 1}] * world, strategy="SPREAD", env={"PYTHONPATH": path}, wait=30
        )
        with group:
            group.call("build", f"file://{folder}/store", tensor, stages, timeout=1500)
            assert all(group.call("open", True)), "no process group is made for sampled tokens"
            for number in range(8):
                group.call("relay", number, wait=True)
            group.call("many", ROUNDS)
            group.call("blocking", 3)
            group.call("tokens", ROUNDS)
            reports = group.call("report")
            if world == 2:
                group.call("send_one")
                reports[1]["crossed"] = group.call("crossed", ranks=[1])[0]
        return {"reports": reports}


def main() -> None:
    """One line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--transport", choices=("auto", "tcp", "shm", "rdma"))
    options = parser.parse_args()
    # Classes travel by the name of their module, which must be one that workers can import.
    sys.path.insert(0, str(Path(__file__).parent))
    import coordinator

    print(json.dumps(coordinator.run(options.stages, options.tensor, options.transport)))


if __name__ == "__main__":
    main()
