"""vLLM's hop between two stages, staged through host memory and gloo: what is left without rayless where both stages share one GPU, since NCCL refuses two
ranks there. A worker imports this module for :class:`Staged` (``worker_extension_cls``), and that puts it under vLLM's pipeline group:

- hidden states: out to host memory, vLLM's own gloo messages (two of metadata and one a tensor), and in;
- sampled tokens (``PPHandler``, the V2 runner's, 0.25): a gloo group in place of the NCCL one, with the same copies around it.

Every copy is waited for on the host, as gloo needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from vllm.distributed.parallel_state import GroupCoordinator

_isend, _irecv = GroupCoordinator.isend_tensor_dict, GroupCoordinator.irecv_tensor_dict
_broadcast = torch.distributed.broadcast
_groups: list[Any] = []


class Staged:
    """Nothing of its own: the import is what counts."""


def _isend_staged(self: Any, tensor_dict: dict[str, Any], *args: Any, **kwargs: Any) -> list[Any]:
    host = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in tensor_dict.items()}
    return list(_isend(self, host, *args, **kwargs))


def _irecv_staged(
    self: Any, *args: Any, **kwargs: Any
) -> tuple[dict[str, Any] | None, list[Any], list[Callable[[], None]]]:
    values, handles, after = _irecv(self, *args, **kwargs)

    def to_device() -> None:
        for name, value in (values or {}).items():
            if isinstance(value, torch.Tensor):
                values[name] = value.to(self.device)

    return values, handles, [*after, to_device]


def _gloo_sibling(self: Any, group_desc: str | None = None) -> Any:
    for ranks in self.group_ranks:
        group = torch.distributed.new_group(ranks, backend="gloo", group_desc=group_desc)
        if self.rank in ranks:
            _groups.append(group)
    return _groups[-1]


def _broadcast_staged(tensor: Any, src: int | None = None, group: Any = None, *args: Any, **kwargs: Any) -> Any:
    if not (tensor.is_cuda and any(group is known for known in _groups)):
        return _broadcast(tensor, src, group, *args, **kwargs)
    host = tensor.cpu()
    _broadcast(host, src, group)
    if torch.distributed.get_rank() != src:
        tensor.copy_(host)
    return None


GroupCoordinator.isend_tensor_dict = _isend_staged
GroupCoordinator.irecv_tensor_dict = _irecv_staged
GroupCoordinator.make_sibling_device_group = _gloo_sibling
torch.distributed.broadcast = _broadcast_staged
