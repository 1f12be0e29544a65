"""vLLM's pipeline axis on rayless's links: what stages say to each other does not pass through torch.distributed.

Two things cross between stages at every step:

- hidden states, from each stage to the next (:mod:`hop`);
- with async scheduling, the sampled tokens, from the last stage to all earlier ones (:mod:`tokens`).

vLLM hands both to the coordinator of its pipeline group, whose methods differ between releases. They are replaced
on that one object, in the process of a worker of ours, by probing what the installed release has. Everything else of
the group stays with torch: its start-up, barriers, and the broadcast of logits (``broadcast_tensor_dict``), which no step of
ours uses. RAYLESS_PIPELINE=torch leaves all of it as vLLM made it. RAYLESS_PIPELINE=rayless-ahead lets a GPU's stream wait for the sampled
tokens in place of the host (:meth:`rayless.fabric.TensorReceiver.irecv_ahead`): right, but no faster where it was measured (one H200, both stages on it).

A worker calls :func:`prepare` before vLLM builds its groups, :func:`open_links` when the device is ready and before
the model is loaded, and :meth:`Pipeline.close` at a regular end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rayless.exceptions import LinkError
from rayless.vllm.pipeline.hop import Hop
from rayless.vllm.pipeline.tokens import Tokens, keep_sibling_group_away

if TYPE_CHECKING:
    from rayless import fabric

#: The switch.
VARIABLE = "RAYLESS_PIPELINE"
#: Seconds for the news of a death to end this process.
DEATH_SECONDS = 2.0
#: Channels of the links between two ranks.
HIDDEN_STATES, SAMPLED_TOKENS = 0, 1


def is_ours(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the stages talk over rayless's links: RAYLESS_PIPELINE is ``rayless`` (the default) or ``rayless-ahead``, not ``torch``."""
    return _way(environ) != "torch"


def is_ahead(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream may wait for sampled tokens whose header has not come: RAYLESS_PIPELINE is ``rayless-ahead``."""
    return _way(environ) == "rayless-ahead"


def _way(environ: Mapping[str, str]) -> str:
    value = environ.get(VARIABLE, "").strip().lower() or "rayless"
    if value not in ("rayless", "rayless-ahead", "torch"):
        raise ValueError(
            f"{VARIABLE}={environ[VARIABLE]} is no way to join pipeline stages\n"
            "hint: give `rayless` (shared memory, RDMA or TCP; the default), `rayless-ahead` or `torch` (gloo and NCCL)"
        )
    return value


def prepare() -> None:
    """Before vLLM's groups exist: the process group that it would make for the sampled tokens is not made."""
    keep_sibling_group_away()


class Pipeline:
    """What this rank has of the pipeline's links."""

    def __init__(self, hop: Hop, tokens: Tokens | None) -> None:
        self.hop = hop
        self.tokens = tokens

    def close(self) -> None:
        """Closes every link in order."""
        self.hop.close()
        if self.tokens is not None:
            self.tokens.close()


def open_links(group: Any, runner: Any, *, rank: int, timeout: float) -> Pipeline | None:
    """Opens this rank's links and puts them under ``group`` and ``runner``; ``None`` where there is one stage.

    ``group``: vLLM's pipeline group. ``runner``: its model runner. ``rank``: of this process in the rayless group.
    All ranks call this at the same point; ``timeout`` seconds are what each link gets.
    """
    from rayless import fabric

    if group.world_size == 1:
        return None
    if not group.unique_name.startswith("pp"):
        raise ValueError(f"group `{group.unique_name}` is not the pipeline's")
    # vLLM's ranks count through all data-parallel replicas, ours through one.
    shift = group.ranks[group.rank_in_group] - rank
    stages = [global_rank - shift for global_rank in group.ranks]
    stage, last = group.rank_in_group, group.world_size - 1

    def sender(to: int, channel: int) -> fabric.TensorSender:
        return fabric.TensorSender(fabric.send_link(stages[to], channel, timeout=timeout))

    def receiver(start: int, channel: int) -> fabric.TensorReceiver:
        return fabric.TensorReceiver(fabric.recv_link(stages[start], channel, timeout=timeout))

    # Each end waits for the other: from the first stage to the last, then back, so that nobody waits in a circle.
    before = receiver(stage - 1, HIDDEN_STATES) if stage > 0 else None
    after = sender(stage + 1, HIDDEN_STATES) if stage < last else None
    hop = Hop(group, before, after, current_step)
    tokens = None
    if Tokens.are_sent(runner):
        if stage == last:
            tokens = Tokens(current_step, senders=[sender(to, SAMPLED_TOKENS) for to in range(last)])
        else:
            tokens = Tokens(current_step, receiver=receiver(last, SAMPLED_TOKENS), ahead=is_ahead())
    return install(group, runner, hop, tokens)


def install(group: Any, runner: Any, hop: Hop, tokens: Tokens | None) -> Pipeline:
    """Puts links that are open under vLLM's objects."""
    hop.install()
    if tokens is not None:
        tokens.install(group, runner)
        hop.confirm = tokens.confirm
    return Pipeline(hop, tokens)


def let_the_death_be_told(error: LinkError) -> None:
    """Waits, after a link failed, for what its peer's keeper has to say.

    Where the peer's process died, its keeper knows why, and ends this group within milliseconds, with that cause. Only
    where no such news comes is the loss itself the cause.
    """
    if error.kind in ("peer gone", "peer reported"):
        threading.Event().wait(DEATH_SECONDS)


def current_step() -> int:
    """The step that this rank is at: the number of the group's call, which is the same on all ranks."""
    from rayless import _worker

    host = _worker.current()
    return 0 if host is None else host.call
