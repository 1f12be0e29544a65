"""An engine whose stages talk over links: what passes through torch.distributed then, and what does with the switch off."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import PROMPTS, TOKENS
from rayless.vllm import pipeline
from serving import Cluster

DRIVER = Path(__file__).parent / "pipeline_driver.py"


@pytest.fixture(scope="module")
def runs(cluster: Cluster, models: dict[str, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same requests with links of ours, and with torch's groups."""
    asked = json.dumps([str(models["llama"]), PROMPTS, TOKENS, ["torch", "rayless"]])
    environment = cluster.environment(0, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    done = cluster.hosts[0].run([sys.executable, str(DRIVER), asked], env=environment, check=False, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{(done.stderr or '')[-6000:]}"
    torchs, ours = json.loads(done.stdout.splitlines()[-1])
    return ours, torchs


def test_no_message_of_a_step_passes_through_torch(runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Chunked prefill, eight requests at once and single ones: not one message to gloo, on either rank."""
    assert runs[0]["torch"] == [{}, {}]


def test_with_the_switch_off_all_of_them_do(runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Per step: length and content of the metadata, then two tensors."""
    first, second = runs[1]["torch"]
    assert first["send"] >= 4 * TOKENS
    assert second["recv"] == first["send"]


def test_both_give_the_tokens_of_one_worker(
    runs: tuple[dict[str, Any], dict[str, Any]], expected: dict[str, list[list[int]]]
) -> None:
    for run in runs:
        assert run["tokens"] == expected["llama"]
        assert run["together"][1:] == expected["llama"]
    assert runs[0]["together"] == runs[1]["together"]


def test_a_crossed_step_ends_the_group_with_that_cause_and_no_token(
    runs: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    failure = runs[0]["failure"]
    assert "link 0->1.0" in failure["told"]
    assert "rank 1 is at step" in failure["told"]
    assert failure["left"].startswith("executor failed: ")
    assert "rank 1 is at step" in failure["left"]


def test_the_switch_takes_three_words() -> None:
    assert pipeline.is_ours({})
    assert pipeline.is_ours({"RAYLESS_PIPELINE": " Rayless "})
    assert not pipeline.is_ours({"RAYLESS_PIPELINE": "torch"})
    assert not pipeline.is_ahead({})
    assert pipeline.is_ours({"RAYLESS_PIPELINE": "rayless-ahead"})
    assert pipeline.is_ahead({"RAYLESS_PIPELINE": "rayless-ahead"})
    with pytest.raises(ValueError, match=r"RAYLESS_PIPELINE=nccl is no way to join pipeline stages\nhint: "):
        pipeline.is_ours({"RAYLESS_PIPELINE": "nccl"})
