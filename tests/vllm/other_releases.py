"""The pipeline link against the sources of other vLLM releases, without installing them.

    python other_releases.py [VERSION ...]      (default: 0.15.1 0.20.2 0.25.1)

Fetches each wheel with pip, keeps its Python files in ~/.cache/rayless/vllm-sources/, and checks there what `rayless.vllm.pipeline` relies
on: the methods of the pipeline's group and their parameters, what the worker waits for after a send, and, run over a real link, the
functions that send sampled tokens. Part of `make test-long`: the wheels are some 250 to 500 MB each.
"""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from rayless import fabric
from rayless.vllm.pipeline import tokens as ours
from rayless.vllm.pipeline.hop import Hop

RELEASES = ("0.15.1", "0.20.2", "0.25.1")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64", "manylinux1_x86_64")
#: What a release has: names of the group's methods that are replaced, and whether its runners send tokens.
HAS_ISEND = {"0.15.1": False, "0.20.2": True, "0.25.1": True}
STEPS = 6


def sources(version: str) -> Path:
    """The folder with the release's ``vllm`` package."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rayless" / "vllm-sources"
    folder = cache / version
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
            fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", *platforms]
            subprocess.run([*fetch, "--python-version", "3.12", "-d", partial, f"vllm=={version}"], check=True)
            (wheel,) = Path(partial).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(f"{partial}/made", [name for name in archive.namelist() if name.endswith(".py")])
            Path(partial, "made").rename(folder)
    return folder / "vllm"


def methods(path: Path, owner: str) -> dict[str, ast.FunctionDef]:
    """The methods of a class, by name."""
    tree = ast.parse(path.read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner]
    return {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}


def made(functions: Iterator[ast.FunctionDef], names: dict[str, Any]) -> dict[str, Any]:
    """The functions themselves, over the given global names."""
    for function in functions:
        function.decorator_list = []
        annotations = ast.parse("from __future__ import annotations")
        exec(compile(ast.Module([*annotations.body, function], []), function.name, "exec"), names)
    return names


class Group:
    """The pipeline's group of two ranks, as far as the functions under test ask it."""

    device_group = object()
    rank = last_rank = 1
    device = "cpu"
    is_last_rank = True


def check_hop(version: str, vllm: Path) -> None:
    """Our methods take what those of the release take, and the worker waits for what we give it."""
    group = methods(vllm / "distributed/parallel_state.py", "GroupCoordinator")
    has_isend = "isend_tensor_dict" in group
    assert has_isend == HAS_ISEND[version], "other methods than the table in hop.py says"
    pairs = {"isend_tensor_dict": Hop.isend, "irecv_tensor_dict": Hop.irecv}
    if not has_isend:
        pairs = {"send_tensor_dict": Hop.send, "recv_tensor_dict": Hop.recv}
    for name, mine in pairs.items():
        theirs = [argument.arg for argument in group[name].args.args]
        assert theirs == list(inspect.signature(mine).parameters), name
    worker = methods(vllm / "v1/worker/gpu_worker.py", "Worker")["execute_model"]
    text = ast.unparse(worker)
    for name in pairs:
        assert f"get_pp_group().{name}(" in text, name
    if has_isend:
        assert "self._pp_send_work = get_pp_group().isend_tensor_dict(" in text, "all handles are waited for"


def check_v1_tokens(vllm: Path) -> bool:
    """The V1 runner's functions over a link. False: this release has none."""
    found = methods(vllm / "v1/worker/gpu_model_runner.py", "GPUModelRunner")
    if ours.V1_SEND not in found:
        return False
    group = Group()
    names = made(
        (found[name] for name in (ours.V1_SEND, ours.V1_RECEIVE)),
        {"torch": torch, "np": numpy, "get_pp_group": lambda: group},
    )

    class Runner:
        use_async_scheduling = True
        device = "cpu"
        discard_request_mask = types.SimpleNamespace(np=numpy.zeros(4, dtype=bool))

        def __init__(self) -> None:
            self.requests: dict[str, Any] = {}
            self.input_batch = types.SimpleNamespace(
                num_reqs=4,
                req_ids="abcd",
                prev_sampled_token_ids=None,
                is_token_ids=numpy.zeros((4, 99), dtype=bool),
                num_tokens_no_spec=numpy.zeros(4, dtype=int),
            )

        def _is_all_reqs_chunked_prefill(self) -> bool:
            return False

    for name in (ours.V1_SEND, ours.V1_RECEIVE):
        setattr(Runner, name, names[name])
    first, last = Runner(), Runner()
    assert ours.Tokens.are_sent(first)
    step = join(group, first, last)
    for number in range(STEPS):
        step[0] = number
        sampled = torch.arange(4, dtype=torch.int32).reshape(4, 1) + number
        group.is_last_rank = True
        getattr(last, ours.V1_SEND)(sampled)
        group.is_last_rank = False
        getattr(first, ours.V1_RECEIVE)()
        assert torch.equal(first.input_batch.prev_sampled_token_ids, sampled)
    return True


def check_v2_functions(vllm: Path) -> bool:
    """The V2 runner's functions of 0.20 over a link. False: this release has none, or has a handler."""
    path = vllm / "v1/worker/gpu/pp_utils.py"
    if not path.is_file():
        return False
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    if not any(function.name == "pp_broadcast" for function in functions):
        return False
    runner_text = (vllm / "v1/worker/gpu/model_runner.py").read_text()
    assert "from vllm.v1.worker.gpu.pp_utils import pp_broadcast, pp_receive" in runner_text
    group = Group()
    names = made(iter(functions), {"torch": torch, "get_pp_group": lambda: group})
    ends = []
    for _ in range(2):
        # Each rank has the runner's module for itself.
        module = types.ModuleType(ours.V2_MODULE)
        module.pp_broadcast, module.pp_receive = names["pp_broadcast"], names["pp_receive"]  # type: ignore[attr-defined]
        ends.append(module)
    runner = type("GPUModelRunner", (), {"__module__": ours.V2_MODULE})()
    before = sys.modules.get(ours.V2_MODULE)
    try:
        step = join(group, runner, runner, modules=ends)
    finally:
        if before is None:
            sys.modules.pop(ours.V2_MODULE, None)
        else:
            sys.modules[ours.V2_MODULE] = before
    for number in range(STEPS):
        step[0] = number
        sampled = torch.arange(8).reshape(4, 2) + number
        counts = torch.full((4,), number, dtype=torch.int32)
        group.is_last_rank = True
        ends[1].pp_broadcast(sampled, counts, counts + 1)
        group.is_last_rank = False
        received = ends[0].pp_receive(4, max_sample_len=2)
        for got, wanted in zip(received, (sampled, counts, counts + 1), strict=True):
            assert torch.equal(got, wanted)
    return True


def join(group: Any, first: Any, last: Any, modules: list[types.ModuleType] | None = None) -> list[int]:
    """Links between the two; gives where their common step is kept."""
    sender, receiver = fabric.link_pair("tcp", from_rank=1, to_rank=0, channel=1)
    step = [0]
    ends: list[tuple[Any, dict[str, Any]]] = [
        (first, {"receiver": fabric.TensorReceiver(receiver)}),
        (last, {"senders": [fabric.TensorSender(sender)]}),
    ]
    for number, (runner, link) in enumerate(ends):
        if modules is not None:
            sys.modules[ours.V2_MODULE] = modules[number]
            assert ours.Tokens.are_sent(runner)
        ours.Tokens(lambda: step[0], **link).install(group, runner)
    return step


def check_handler(vllm: Path) -> bool:
    """``PPHandler`` of 0.25 and newer: the tests of `test_tokens.py` with this release's. False: it has none."""
    path = vllm / "v1/worker/gpu/pp_utils.py"
    if not path.is_file() or "class PPHandler" not in path.read_text():
        return False
    test = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent / "test_tokens.py")]
    subprocess.run(test, env={**os.environ, "RAYLESS_PP_UTILS": str(path)}, check=True)
    return True


def main() -> None:
    """Says what was checked of each release."""
    for version in sys.argv[1:] or RELEASES:
        vllm = sources(version)
        check_hop(version, vllm)
        checks = {
            "tokens of the V1 runner": check_v1_tokens(vllm),
            "pp_broadcast and pp_receive": check_v2_functions(vllm),
            "PPHandler": check_handler(vllm),
        }
        print(f"vLLM {version}: " + ", ".join(["hop", *(name for name, there in checks.items() if there)]), flush=True)


if __name__ == "__main__":
    main()
