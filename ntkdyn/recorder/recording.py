"""The file side of a recorder: the run's folder, its manifest and its fixed arrays."""

from __future__ import annotations

import atexit
import hashlib
import platform
import shlex
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..clone import unwrapped
from ..probe import Bands, Field
from ..processor import processor_name
from ..store.bands import is_large
from ..store.reader import RunReader
from ..store.writer import RunWriter, refuse_occupied
from .guard import without_modes
from .snapshots import ProbeSet

Records = Mapping[str, Mapping[str, np.ndarray[Any, Any] | Bands]]
# What must not have changed when a run is continued.
_SAME = ("run", "experiment", "config", "seed", "parameters", "batchnorm", "sets")


class Recording:
    """Writes what a recorder hands it; outlives the recorder by as long as closing takes.

    The folder is made at the first snapshot, so that settings which turn out wrong there leave nothing behind.

    Raises: RecordingExists: the folder holds something that is no run; nothing in it was touched. That of a run is
        refused when it is opened, unless the run is continued.
    """

    def __init__(
        self,
        path: Path,
        sets: Mapping[str, ProbeSet],
        calibration: Any,
        manifest: Mapping[str, Any],
        commit_every: float = 0.0,
    ) -> None:
        if not (path / "run.json").exists():
            refuse_occupied(path)
        self.path = path
        self._sets = sets
        self._calibration = calibration
        self._manifest = manifest
        self._commit_every = commit_every
        self._writer: RunWriter | None = None
        self._declared: set[str] = set()
        self._status: str | None = None
        self.final_weights: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether the folder has been made and nobody has called close."""
        return self._writer is not None and self._status is None

    @property
    def run(self) -> str | None:
        """Identity of the run, None before the first snapshot."""
        return None if self._writer is None else str(self._writer.manifest.get("run"))

    def reopened(self) -> Recording:
        """A recording that may go on with the run of this one, which ends here."""
        # Once more where the disk has refused it; else its lock would keep the next one out.
        self.close("finished")
        return Recording(self.path, self._sets, self._calibration, self._manifest, self._commit_every)

    def open(self, facts: Mapping[str, Any], *, after: int | None = None, run: str | None = None) -> None:
        """Make the folder; write run.json (entries of the manifest win over facts), probe sets, calibration batch.

        Args: after: continue the run that is there behind this step.  run: its identity, to tell it from others.
        """
        fixed = {(f"probe_sets/{name}" if name else "probe_sets"): _set_arrays(one) for name, one in self._sets.items()}
        if self._calibration is not None:
            fixed["calibration"] = _leaves("inputs", self._calibration)
        on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        own = {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "processor": processor_name(),
            "accelerator": torch.cuda.get_device_name() if on_cuda else None,
            "git": git_commit(Path.cwd()),
            "command": shlex.join(sys.argv),
            "sets": {group: _digest(arrays) for group, arrays in fixed.items()},
        }
        manifest = own | dict(facts) | dict(self._manifest)
        if after is not None:
            manifest |= {"run": run}
        self._writer = RunWriter(self.path, manifest, after=after, same=_SAME, commit_every=self._commit_every)
        for line in self._writer.repaired:
            print(f"ntkdyn: {self.path}: repaired: {line}", file=sys.stderr)
        missing = {group: arrays for group, arrays in fixed.items() if not self._writer.has_arrays(group)}
        self._writer.write_arrays(missing, dims=_fixed_dims(missing))

    def last_arrays(self) -> dict[str, tuple[int, dict[str, np.ndarray[Any, Any] | None]]]:
        """What the run holds already: group -> its last step and the arrays of that step, static ones too.

        None stands for a large one, which should not be in memory.
        """
        # Opening the writer has validated every file.
        reader = RunReader.open(self.path, trusted=True)
        found = {}
        for group in reader.groups():
            if reader.places(group):
                names = [name for name in reader.names() if reader.owner(name)[0].group == group]
                arrays = {
                    name.removeprefix(f"{group}/"): None if is_large(reader.field(name)) else reader.read_row(name, -1)
                    for name in names
                }
                found[group] = (int(reader.steps(group)[-1]), arrays)
        return found

    def write(
        self,
        step: int,
        epoch: float | None,
        records: Records,
        declarations: Mapping[str, tuple[Sequence[Field], Mapping[str, Any]]],
        seconds: Mapping[str, float],
        written: Callable[[Records], None],
    ) -> None:
        """Commit one snapshot; groups seen for the first time are declared with their fields and attributes.

        Args: written: told what is in the run. Not told where an exception has kept the snapshot from it.
        """
        if self._writer is None:
            return
        for group in records:
            if group not in self._declared:
                fields, attributes = declarations[group]
                self._writer.declare(group, fields, attributes=attributes)
                self._declared.add(group)
        in_bands = any(isinstance(array, Bands) for arrays in records.values() for array in arrays.values())
        if not in_bands:
            # Before: the writer keeps it, also where Ctrl-C comes while the disk takes it.
            written(records)
        done = self._writer.commit(step, epoch, records, seconds=seconds)
        if in_bands:
            # Bands that the disk refuses are gone, and so are their static fields.
            written(records if done else {})

    def flush(self) -> None:
        """Commit what has been gathered."""
        if self._writer is not None and not self._writer.closed:
            self._writer.flush()

    def finish(self, results: Mapping[str, float]) -> None:
        """Store results in run.json."""
        if self._writer is not None:
            self._writer.update(results={name: float(value) for name, value in results.items()})

    def note(self, **entries: Any) -> None:
        """Store further entries in run.json."""
        if self._writer is not None:
            self._writer.update(**entries)

    def close(self, status: str) -> None:
        """Set the status, unless an earlier call has set one, and close. A finished run is packed.

        What the disk refuses then is tried again by a further call; after a complete one it does nothing.
        """
        if self._writer is not None and not self._writer.closed:
            self._status = self._status or status
            # A run that was cut short must end quickly; its segments are read as they are.
            pack = self._status == "finished"
            self._writer.close(pack=pack, status=self._status, final_weights_sha256=self.final_weights)

    def close_after(self, owner: object) -> None:
        """Close as finished when the owner goes, at exit at the latest, as nobody has to call close."""
        if self not in _left_open:
            _left_open.add(self)
            # At exit ours comes before.
            weakref.finalize(owner, self.close, "finished").atexit = False


# Those that recorders have left open.
_left_open: weakref.WeakSet[Recording] = weakref.WeakSet()


@atexit.register
def _close_left_open() -> None:
    # An entry of its own, as that of weakref may run after h5py has taken its converters back.
    for recording in list(_left_open):
        recording.close("finished")


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


def _set_arrays(one: ProbeSet) -> dict[str, np.ndarray[Any, Any]]:
    targets = {} if one.targets is None else {"targets": _array(one.targets)}
    return _leaves("inputs", one.inputs) | targets


def _digest(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _leaves(name: str, inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
    leaves = [_array(leaf) for leaf in tree_leaves(inputs)]
    return {name: leaves[0]} if len(leaves) == 1 else {f"{name}_{index}": leaf for index, leaf in enumerate(leaves)}


@without_modes()
def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    values = tensor.detach().cpu()
    return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)


def _fixed_dims(groups: Mapping[str, Mapping[str, np.ndarray[Any, Any]]]) -> dict[str, tuple[str, ...]]:
    return {
        f"{group}/{name}": ("sample", *(f"{name}_axis_{axis}" for axis in range(1, one.ndim)))
        for group, arrays in groups.items()
        for name, one in arrays.items()
    }


@without_modes()
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
