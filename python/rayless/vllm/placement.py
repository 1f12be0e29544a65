"""Where the ranks of an engine run, as each of them has to know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict


class Plan(TypedDict):
    """Where one rank runs, as the executor computed it from the placement."""

    rank: int
    world_size: int
    #: Index among the ranks of this node, and how many there are.
    local_rank: int
    local_world_size: int
    #: The devices that this engine holds on this node, ascending, and which of them is this rank's.
    gpus: list[int]
    device: int
    address: str
    node: str
    #: Differs between nodes and between engines; ranks that share it may use shared memory with each other.
    identity: str


def make_plans(ranks: Sequence[Any], group: str) -> list[Plan]:
    """Every rank's place: index on its node, the node's devices, and the identity of node and engine."""
    plans: list[Plan] = []
    for info in ranks:
        here = [other for other in ranks if other.node_id == info.node_id]
        gpus = sorted({gpu for other in here for gpu in other.gpus})
        plans.append(
            {
                "rank": info.rank,
                "world_size": len(ranks),
                "local_rank": here.index(info),
                "local_world_size": len(here),
                "gpus": gpus,
                "device": gpus.index(info.gpus[0]) if info.gpus else 0,
                "address": info.address,
                "node": f"node {info.node_name}",
                "identity": f"{group}.{info.node_id}",
            }
        )
    return plans


def describe(plans: Sequence[Plan], tensor_parallel_size: int) -> list[str]:
    """One line per stage: which ranks, on which node, on which GPUs."""
    lines = []
    for first in range(0, len(plans), tensor_parallel_size):
        stage = plans[first : first + tensor_parallel_size]
        places = []
        for node in dict.fromkeys(plan["node"] for plan in stage):
            here = [plan for plan in stage if plan["node"] == node]
            gpus = ",".join(str(plan["gpus"][plan["device"]]) for plan in here if plan["gpus"])
            places.append(f"{node} ({here[0]['address']}{', GPU ' + gpus if gpus else ''})")
        ranks = f"rank {first}" if len(stage) == 1 else f"ranks {first}-{first + len(stage) - 1}"
        lines.append(f"pipeline stage {first // tensor_parallel_size}: {ranks} on {' and '.join(places)}")
        if len(places) > 1:
            lines.append(
                f"stage {first // tensor_parallel_size} spans {len(places)} nodes: its all-reduces cross the network"
            )
    return lines
