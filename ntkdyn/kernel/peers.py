"""The processes of torch.distributed among which work is divided, and how they hear of each other's failures."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ConfigurationError, ProcessFailure

_MESSAGE_BYTES = 1024


class Peers:
    """The processes of the default process group, and how each hears that another one has failed.

    They meet on a group of their own, over gloo whatever the default is, so that no device has to wait for the other.
    """

    def __init__(self, timeout: float) -> None:
        self.rank, self.size = 0, 1
        self._timeout = timedelta(seconds=timeout)
        self._group: dist.ProcessGroup | None = None
        if not dist.is_available():
            return
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        elif dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigurationError(
                f"sharded_ntk: found torchrun with {os.environ['WORLD_SIZE']} processes and no process group, expected "
                "torch.distributed.init_process_group('gloo') or ('nccl') first: each would compute everything"
            )

    def __enter__(self) -> Peers:
        if self.size > 1:
            with self._answering():
                self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # Without the place in gloo's source before, and its advice behind.
            reason = str(error).strip().split("\n")[0].rpartition("] ")[2].split(". ")[0]
            raise ProcessFailure(
                f"rank {self.rank} of {self.size}: another process ended, or has not answered for "
                f"{self._timeout.total_seconds():g} s ({reason}); tiles in the sink are kept; start all processes "
                "again to go on, with a larger timeout= where tiles are slow"
            ) from error

    def _gather(self, text: str) -> list[str]:
        """One text of each process, cut to 1 KiB."""
        if self._group is None:
            return [text]
        data = text.encode()[:_MESSAGE_BYTES]
        # On the CPU, whatever the user's default device is: gloo takes nothing else everywhere.
        message = torch.tensor(list(data.ljust(_MESSAGE_BYTES, b"\0")), dtype=torch.uint8, device="cpu")
        answers = [torch.zeros_like(message) for _ in range(self.size)]
        with self._answering():
            # Names the ranks that do not come, which the collective alone does not.
            dist.monitored_barrier(self._group, timeout=self._timeout, wait_all_ranks=True)
            dist.all_gather(answers, message, group=self._group)
        return [answer.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for answer in answers]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for all processes at the end of the block; where one of them failed, all raise.

        Raises: what was raised here; ProcessFailure: what was raised elsewhere.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        message = "" if failure is None else f"{type(failure).__name__}: {' '.join(str(failure).split())}"
        try:
            answers = self._gather(message)
        except ProcessFailure:
            if failure is None:
                raise
            answers = []
        if failure is not None:
            raise failure
        for rank, answer in enumerate(answers):
            if answer:
                raise ProcessFailure(
                    f"rank {self.rank} of {self.size} ends because rank {rank} failed: {answer}; tiles in the sink are "
                    "kept; mend this and start all processes again to go on"
                )

    def compare(self, values: Mapping[str, Any]) -> None:
        """Raise ConfigurationError, in all processes, where they disagree about a value."""
        short = {
            key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
            for key, value in values.items()
        }
        answers = self._gather(json.dumps(short))
        for rank, answer in enumerate(answers):
            if answer != answers[0]:
                theirs, first = json.loads(answer), json.loads(answers[0])
                different = [key for key in first if theirs.get(key) != first[key]]
                raise ConfigurationError(
                    f"sharded_ntk: rank {rank} differs from rank 0 in {', '.join(different)}; expected the same "
                    "network, inputs, settings and sink in every process; load the same weights and seed alike"
                )

    def of_first(self, values: Sequence[bool]) -> list[bool]:
        """The values that the process of rank 0 has, in every process."""
        shared = torch.tensor(values, dtype=torch.uint8, device="cpu")
        if self._group is not None:
            with self._answering():
                dist.broadcast(shared, src=0, group=self._group)
        return [bool(value) for value in shared.tolist()]
