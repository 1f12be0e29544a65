"""What a worker's environment is made of, later ones first:

1. the values of its own node (``rayless status`` shows them with their source): addresses, interfaces, devices;
2. ``rank_env`` of the launch, then ``env``;
3. the driver's environment, less :data:`NOT_FORWARDED`.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Variables of the driver that mean something else, or nothing, in another process or on another node.
NOT_FORWARDED = frozenset(
    {
        # Secrets and paths of the node itself.
        "RAYLESS_TOKEN",
        "RAYLESS_TOKEN_FILE",
        "RAYLESS_RUN_DIR",
        # The node's own addresses and interfaces; vLLM's Ray executor keeps the first four back, too.
        "VLLM_HOST_IP",
        "VLLM_HOST_PORT",
        "VLLM_PORT",
        "VLLM_NIXL_SIDE_CHANNEL_HOST",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "TP_SOCKET_IFNAME",
        "HOSTNAME",
        # What another launcher said of the driver's own process.
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "VLLM_DIST_IDENT",
        # Devices are given out per rank.
        "ASCEND_RT_VISIBLE_DEVICES",
        "CUDA_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "NVIDIA_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "ZE_AFFINITY_MASK",
        # The driver's shell and session.
        "_",
        "OLDPWD",
        "PWD",
        "SHLVL",
        "SSH_AUTH_SOCK",
        "SSH_CLIENT",
        "SSH_CONNECTION",
        "SSH_TTY",
        "TERM",
        "XDG_RUNTIME_DIR",
        "XDG_SESSION_ID",
    }
)

#: Set by the keeper for each worker; a driver that is itself a worker must not hand its own on.
PER_WORKER = (
    "RAYLESS_GPU_IDS",
    "RAYLESS_GPU_UUIDS",
    "RAYLESS_GROUP",
    "RAYLESS_LOCAL_RANK",
    "RAYLESS_LOCAL_WORLD_SIZE",
    "RAYLESS_NODE",
    "RAYLESS_NODE_ID",
    "RAYLESS_NODE_IP",
    "RAYLESS_NODE_NAME",
    "RAYLESS_RANK",
    "RAYLESS_WORKER_FDS",
    "RAYLESS_WORLD_SIZE",
)


def forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of ``environ`` that goes along to the workers."""
    return {name: value for name, value in environ.items() if name not in NOT_FORWARDED and name not in PER_WORKER}
