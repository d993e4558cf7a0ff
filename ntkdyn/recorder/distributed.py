"""What a recorder must know of other processes: who records, how long the others wait, what they hold.

Nothing here is a collective call, so that a process that records never waits for one that does not.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError


def is_first_process() -> bool:
    """Whether this process is alone, or rank 0 of the process group."""
    return _size() == 1 or torch.distributed.get_rank() == 0


def collective_timeout() -> float | None:
    """Seconds after which collective calls of the waiting processes fail; None where there are no others."""
    if _size() == 1:
        return None
    distributed: Any = torch.distributed
    try:
        # There is no public way to the timeout that a group was made with.
        device = torch.device("cuda" if "cuda" in distributed.get_backend_config() else "cpu")
        return float(distributed.group.WORLD._get_backend(device).options._timeout.total_seconds())
    except (AttributeError, RuntimeError):
        return float(distributed.default_pg_timeout.total_seconds())


def refuse_sharded(model: nn.Module) -> None:
    """Refuse networks of whose parameters each process holds a part: gathering them would be a collective call.

    Raises: ConfigurationError: names the parameter or layer.
    """
    for name, module in model.named_modules():
        if _is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            raise _sharded(f"layer {name or '<root>'!r}", "FullyShardedDataParallel")
    for name, parameter in model.named_parameters():
        if _is_a(parameter, "torch.distributed.tensor", "DTensor"):
            raise _sharded(f"parameter {name!r}", "fully_shard or another DTensor")
        # What FSDP has inside may be given without it.
        if getattr(parameter, "_fsdp_flattened", False):
            raise _sharded(f"parameter {name!r}", "FullyShardedDataParallel")
        if hasattr(parameter, "ds_id"):
            raise _sharded(f"parameter {name!r}", "DeepSpeed ZeRO stage 3")


def _size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _is_a(value: object, module: str, name: str) -> bool:
    # What was never imported was never used.
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def _sharded(what: str, how: str) -> ConfigurationError:
    return ConfigurationError(
        f"recorder: found {what} sharded over processes by {how}, expected whole parameters in the process that "
        "records, because gathering them at a snapshot would be a collective call; record with "
        "DistributedDataParallel or ZeroRedundancyOptimizer, or a whole copy of the network, e.g. its EMA"
    )
