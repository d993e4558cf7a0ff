"""The file side of a recorder: the run's folder, its manifest and its fixed arrays."""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..clone import unwrapped
from ..errors import RecordingExists
from ..probe import Field
from ..store.writer import RunWriter
from .snapshots import ProbeSet


class Recording:
    """Writes what a recorder hands it; outlives the recorder by as long as closing takes.

    The folder is made at the first snapshot, so that settings which turn out wrong there leave nothing behind.

    Raises: RecordingExists: the folder holds something; nothing in it was touched.
    """

    def __init__(self, path: Path, sets: Mapping[str, ProbeSet], calibration: Any, manifest: Mapping[str, Any]) -> None:
        if path.is_symlink() or path.exists():
            found = next(path.iterdir(), None) if path.is_dir() else path
            if found is not None:
                raise RecordingExists(
                    f"{path} holds {found.name!r} already; nothing was touched; choose another folder"
                )
        self.path = path
        self._sets = sets
        self._calibration = calibration
        self._manifest = manifest
        self._writer: RunWriter | None = None
        self._declared: set[str] = set()
        self._closed = False
        self.final_weights: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether the folder has been made and the recording is not closed."""
        return self._writer is not None and not self._closed

    def open(self, facts: Mapping[str, Any]) -> None:
        """Make the folder; write run.json (entries of the manifest win over facts), probe sets, calibration batch."""
        own = {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "git": git_commit(Path.cwd()),
            "command": shlex.join(sys.argv),
        }
        self._writer = RunWriter(self.path, own | dict(facts) | dict(self._manifest))
        for name, one in self._sets.items():
            arrays = _leaves("inputs", one.inputs)
            if one.targets is not None:
                arrays["targets"] = _array(one.targets)
            _write_fixed(self._writer, f"probe_sets/{name}" if name else "probe_sets", arrays)
        if self._calibration is not None:
            _write_fixed(self._writer, "calibration", _leaves("inputs", self._calibration))

    def write(
        self,
        step: int,
        epoch: float | None,
        records: Mapping[str, Mapping[str, Any]],
        declarations: Mapping[str, tuple[Sequence[Field], Mapping[str, Any]]],
    ) -> None:
        """Commit one snapshot; groups seen for the first time are declared with their fields and attributes."""
        if self._writer is None:
            return
        for group in records:
            if group not in self._declared:
                fields, attributes = declarations[group]
                self._writer.declare(group, fields, attributes=attributes)
                self._declared.add(group)
        self._writer.commit(step, epoch, records)

    def finish(self, results: Mapping[str, float]) -> None:
        """Store results in run.json."""
        if self._writer is not None:
            self._writer.update(results={name: float(value) for name, value in results.items()})

    def close(self, status: str) -> None:
        """Set the status and close; idempotent. A finished run is packed."""
        if self._writer is not None and not self._closed:
            self._closed = True
            # A run that was cut short must end quickly; its segments are read as they are.
            self._writer.close(pack=status == "finished", status=status, final_weights_sha256=self.final_weights)


def git_commit(folder: Path) -> str | None:
    """Commit that a folder's repository has checked out, read from its files; None outside a repository."""
    try:
        repository = next((place / ".git" for place in (folder, *folder.parents) if (place / ".git").exists()), None)
        if repository is None:
            return None
        if repository.is_file():  # a worktree or submodule points elsewhere
            repository = folder / repository.read_text().removeprefix("gitdir:").strip()
        head = (repository / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        reference = head.removeprefix("ref:").strip()
        shared = repository / "commondir"
        common = repository / shared.read_text().strip() if shared.exists() else repository
        if (common / reference).exists():
            return (common / reference).read_text().strip()
        packed = (line.split() for line in (common / "packed-refs").read_text().splitlines())
        return next((line[0] for line in packed if len(line) == 2 and line[1] == reference), None)
    except (OSError, UnicodeDecodeError):
        return None


def _leaves(name: str, inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
    leaves = [_array(leaf) for leaf in tree_leaves(inputs)]
    return {name: leaves[0]} if len(leaves) == 1 else {f"{name}_{index}": leaf for index, leaf in enumerate(leaves)}


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    values = tensor.detach().cpu()
    return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)


def _write_fixed(writer: RunWriter, group: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    dims = {name: ("sample", *(f"{name}_axis_{axis}" for axis in range(1, one.ndim))) for name, one in arrays.items()}
    writer.write_arrays(group, arrays, dims=dims)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    network = unwrapped(model)
    # Not state_dict: it would run the user's hooks.
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
