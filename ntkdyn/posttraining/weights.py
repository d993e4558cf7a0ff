"""Weights of a user's network from her checkpoint, and of a linearized one into safetensors; no pickled object runs."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _read_tensors
from safetensors.torch import save as _write_tensors
from torch import Tensor, nn

from .. import checkpoint
from ..errors import ConfigurationError, DamagedRecording, MissingRecording, UntrustedFile
from ..store.files import read

# Names under which training loops keep the weights beside optimizer and epoch.
_INSIDE = ("state_dict", "model_state_dict", "model")
# What DistributedDataParallel and torch.compile put in front of every name.
_PREFIXES = ("module.", "_orig_mod.")
_NAMED = 3


def load_weights(model: nn.Module, path: str | Path) -> str:
    """Load a checkpoint into a network and return the SHA-256 of its file.

    A safetensors file, a file of torch.save (read with weights_only=True), or a folder ``checkpoints/<step>`` of a
    recording. Weights may lie under ``state_dict``, ``model_state_dict`` or ``model``; a prefix ``module.`` or
    ``_orig_mod.`` of all names is taken off. Names are those of the network, or those that it had before it was gated.

    Raises: MissingRecording: there is no such file.  DamagedRecording: it cannot be read.  UntrustedFile: it is no
        file, holds objects that are no tensors, or less than its tensors would take.  ConfigurationError: it is of
        another network, or holds NaN.
    """
    state, digest = read_weights(path)
    fit_weights(model, state, f"checkpoint {path}")
    return digest


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load weights into a network; names and errors as for ``load_weights``."""
    own = model.state_dict()
    for prefix in _PREFIXES * 2:  # twice, as either may be in front of the other
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    sizes = {name for name, value in state.items() if name in own and own[name].shape != value.shape}
    reason = ""
    missing: list[str] = []
    unexpected: list[str] = []
    try:
        fitting = {name: value for name, value in state.items() if name not in sizes}
        missing, unexpected = model.load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        # A module's own way of loading refuses a value.
        reason = " ".join(str(error).split())
    problems = [f"missing {_first(absent)}"] if (absent := [name for name in missing if name not in sizes]) else []
    problems += [f"unexpected {_first(unexpected)}"] if unexpected else []
    different = [f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}" for name in sorted(sizes)]
    problems += [f"found {_first(different)}"] if different else []
    problems += [reason] if reason else []
    if problems:
        raise ConfigurationError(
            f"{where}: does not fit the {type(model).__name__} that is built: {'; '.join(problems)}; build the network "
            "that it was saved from, with gates of the same granularity"
        )
    # After the shapes, and in the network's own types, some of which a file may have and isnan not.
    spoilt = [name for name, value in model.state_dict().items() if value.is_floating_point() and value.isnan().any()]
    if spoilt:
        raise ConfigurationError(
            f"{where}: found NaN in {_first(spoilt)}, expected numbers; give a checkpoint from before training diverged"
        )


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Weights by name in a checkpoint, and the SHA-256 of the file that holds them; errors as for ``load_weights``."""
    path = Path(path)
    if path.is_dir():
        content: Any = checkpoint.load(path).model
        return _tensors(content, path), hashlib.sha256(read(path / "tensors.safetensors")).hexdigest()
    try:
        data = read(path)
    except FileNotFoundError:
        raise MissingRecording(f"checkpoint {path}: there is no such file; give a file of weights") from None
    except UntrustedFile:
        raise UntrustedFile(
            f"checkpoint {path}: found a FIFO or device, expected a file of weights or a folder checkpoints/<step>; "
            "copy what it gives into a file first"
        ) from None
    # The header of a safetensors file is JSON behind its length; files of torch.save are zip archives or pickles.
    content = _from_safetensors(data, path) if data[8:9] == b"{" else _from_torch(data, path)
    return _tensors(content, path), hashlib.sha256(data).hexdigest()


def encode_weights(model: nn.Module, facts: Mapping[str, str]) -> bytes:
    """The state dict of a network, frozen channels included, as a safetensors file with facts in its header."""
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state_tensors(model).items()
    }
    return _write_tensors(tensors, {"format": "pt", **facts})


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network.

    Raises: ConfigurationError: it holds something that is no tensor.
    """
    state = dict(model.state_dict())
    strangers = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strangers:
        raise ConfigurationError(
            f"{type(model).__name__}: its state dict holds {_first(strangers)}, no tensor, which safetensors cannot "
            "hold; expected tensors; keep such state in a buffer"
        )
    return state


def _from_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return _read_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _from_torch(data: bytes, path: Path) -> Any:
    if data[:2] == b"PK":
        _refuse_compressed(data, path)
    try:
        with warnings.catch_warnings():
            # It warns of a pickle of another kind before it refuses it.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # Its reader raises nearly everything on a damaged file: RuntimeError, EOFError, KeyError, UnpicklingError.
        stranger = re.search(r"GLOBAL (\S+)", str(error))
        if stranger:
            raise UntrustedFile(
                f"checkpoint {path}: holds an object of {stranger[1]}, expected tensors alone, as loading it would run "
                "code out of the file; save the weights alone: torch.save(model.state_dict(), file)"
            ) from error
        raise _damaged(path, error) from error


def _refuse_compressed(data: bytes, path: Path) -> None:
    """Refuse an archive that is larger than its file: torch.save never compresses, and zeros shrink a thousandfold."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            total = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from error
    if total > len(data):
        raise UntrustedFile(
            f"checkpoint {path}: found {total} bytes compressed into a file of {len(data)}, expected them as "
            "torch.save writes them, not compressed; save the weights again"
        )


def _damaged(path: Path, error: Exception) -> DamagedRecording:
    reason = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
    # Around what it found, torch advises to read the file with pickle all the same.
    for advice in ("Weights only load failed", "This is", "Please", "Check the documentation"):
        reason = reason.partition(advice)[0]
    reason = f"{type(error).__name__}: {reason[:100].strip(' .')}" if reason.strip() else type(error).__name__
    return DamagedRecording(
        f"checkpoint {path}: not readable as safetensors or as a file of torch.save ({reason}); save the weights again"
    )


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    inside = [name for name in _INSIDE if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
    state = content[inside[0]] if inside else content
    found = f"the keys {_first([str(key) for key in state])}" if isinstance(state, Mapping) else type(state).__name__
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigurationError(
            f"checkpoint {path}: found {found}, expected a state dict: names and tensors, at the top or under "
            f"{', '.join(_INSIDE)}"
        )
    empty = [name for name, value in state.items() if not _whole(value)]
    if empty:
        raise UntrustedFile(
            f"checkpoint {path}: found {_first(empty)} with fewer numbers in the file than in its shape, or sparse, "
            "expected dense tensors; save them after .to_dense().contiguous()"
        )
    return dict(state)


def _whole(value: Tensor) -> bool:
    """Whether a tensor has in its storage all numbers of its shape; an expanded one may ask for any memory."""
    if value.layout is not torch.strided or value.is_nested or value.is_meta:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
