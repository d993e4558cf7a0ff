"""Checkpoints from which training goes on bit for bit: tensors as safetensors, everything else as JSON, no pickle.

``FOLDER/<step>/tensors.safetensors`` holds every tensor of the model, the optimizer and the random state;
``FOLDER/<step>/checkpoint.json``, written last, holds their structure, the tensors' checksum and one of its own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _read_tensors
from safetensors.torch import save as _write_tensors
from torch import Tensor, nn

from .errors import ConfigurationError, DamagedRecording, StorageError, UntrustedFile
from .store.files import make_folder, publish, read

FORMAT = "ntkdyn-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """Training at one step.

    Attributes:
        step: applied optimizer steps so far.
        model, optimizer: state dicts; optimizer is None where none was saved.
        extra: whatever the experiment stored (JSON values and tensors).
        random_state: state of torch's CPU generator.
    """

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any] | None
    extra: dict[str, Any]
    random_state: Tensor

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the states back into a model and an optimizer of the same make, and torch's CPU generator as it was.

        Raises: ConfigurationError: the states do not fit.
        """
        try:
            model.load_state_dict(self.model)
            if optimizer is not None and self.optimizer is not None:
                # A copy: torch keeps the tensors it is given, and training would write into this checkpoint.
                optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ConfigurationError(
                f"checkpoint of step {self.step}: does not fit the {type(model).__name__} it is restored into "
                f"({reason}); use the configuration that it was saved with"
            ) from error
        if optimizer is not None and self.optimizer is None:
            raise ConfigurationError(f"checkpoint of step {self.step}: holds no optimizer; save it with one")
        torch.set_rng_state(self.random_state)


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``folder/<step>/`` and return it; visible as a checkpoint only when complete.

    Raises: ConfigurationError: something is neither a tensor nor JSON. StorageError: the disk refused.
    """
    target = Path(folder) / str(step)
    tensors: dict[str, Tensor] = {"random_state": torch.get_rng_state()}
    content = {
        "format": FORMAT,
        "step": step,
        "model": _flatten(model.state_dict(), "model", tensors),
        "optimizer": None if optimizer is None else _flatten(optimizer.state_dict(), "optimizer", tensors),
        "extra": _flatten(dict(extra or {}), "extra", tensors),
    }
    data = _write_tensors(tensors)
    content["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    content["crc32"] = _checksum(content)
    make_folder(target)
    publish(target / "tensors.safetensors", data)
    publish(target / "checkpoint.json", json.dumps(content).encode())
    return target


def load(path: str | Path) -> Checkpoint:
    """Read the checkpoint in the folder ``path``.

    Raises: StorageError: it cannot be read. DamagedRecording: it is no checkpoint, or a checksum does not match.
        UntrustedFile: a FIFO or device is in its place.
    """
    path = Path(path)
    try:
        text, data = read(path / "checkpoint.json"), read(path / "tensors.safetensors")
    except FileNotFoundError as error:
        raise StorageError(f"{path}: no checkpoint here; give a folder checkpoints/<step>") from error
    try:
        content = json.loads(text)
        # Checkpoints of before have no checksum of their own.
        if isinstance(content, dict) and content.pop("crc32", None) not in (None, _checksum(content)):
            raise DamagedRecording(f"{path}: checkpoint.json does not match its checksum; train again")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DamagedRecording(
                f"{path}: checkpoint.json is not of format {FORMAT}; give a folder checkpoints/<step>"
            )
        if content["tensors_sha256"] != hashlib.sha256(data).hexdigest():
            raise DamagedRecording(f"{path}: tensors.safetensors does not match its checksum; train again")
        tensors = _read_tensors(data)
        optimizer = content["optimizer"]
        return Checkpoint(
            step=int(content["step"]),
            model=_restore(content["model"], tensors),
            optimizer=None if optimizer is None else _restore(optimizer, tensors),
            extra=_restore(content["extra"], tensors),
            random_state=tensors["random_state"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DamagedRecording(
            f"{path}: not a complete checkpoint ({type(error).__name__}: {reason}); train again"
        ) from error


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def latest(folder: str | Path) -> Checkpoint | None:
    """The newest checkpoint in a folder ``checkpoints/`` that can be read; one that cannot is warned of.

    One that was cut off while it was written does not count.
    """
    steps = [int(entry.name) for entry in Path(folder).glob("*") if entry.name.isdecimal()]
    for step in sorted(steps, reverse=True):
        place = Path(folder) / str(step)
        if (place / "checkpoint.json").exists():
            try:
                return load(place)
            except (DamagedRecording, StorageError, UntrustedFile) as error:
                warnings.warn(f"{error}; an earlier checkpoint is taken", RuntimeWarning, stacklevel=3)
    return None


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Describe a tree of containers as JSON; tensors go into ``tensors`` under dotted names."""
    if isinstance(value, Tensor):
        # A copy: safetensors refuses tensors that share memory, as tied weights do.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        # Keys of an optimizer's state are integers, which JSON objects cannot have.
        return {"mapping": [[key, _flatten(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flatten(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise ConfigurationError(
        f"checkpoint: {name} is a {type(value).__name__}; expected tensors, numbers, texts, lists or mappings"
    )


def _restore(node: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    (kind, value), *_ = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "mapping":
        return {key: _restore(item, tensors) for key, item in value}
    if kind in ("list", "tuple"):
        items = [_restore(item, tensors) for item in value]
        return items if kind == "list" else tuple(items)
    return value
