"""Whatever a probe may switch in the process is what it was before when the snapshot is over."""

from __future__ import annotations

import os
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize
from torch.utils import _device, _python_dispatch

# There is no public way to the modes and hooks that are entered.
_torch: Any = torch
_C: Any = torch._C
_backends: Any = torch.backends  # annotated without the settings of its parts
# Parents before children: a child without a value of its own shows that of its parent.
_PRECISIONS = (
    (None, _backends),
    (_backends, _backends.mkldnn),
    (_backends, _backends.cudnn),
    *((_backends.mkldnn, getattr(_backends.mkldnn, part)) for part in ("matmul", "conv", "rnn")),
    *((_backends.cudnn, part) for part in (_backends.cuda.matmul, _backends.cudnn.conv, _backends.cudnn.rnn)),
)


def _precisions() -> list[str]:
    return [backend.fp32_precision for _, backend in _PRECISIONS]


def _set_precisions(found: list[str]) -> None:
    of = {id(backend): value for (_, backend), value in zip(_PRECISIONS, found, strict=True)}
    for (parent, backend), value in zip(_PRECISIONS, found, strict=True):
        if backend.fp32_precision != value:
            backend.fp32_precision = "none" if parent is not None and of[id(parent)] == value else value


def _set_filters(filters: list[Any]) -> None:
    # In place, as the interpreter knows the list; catch_warnings would make warnings that were shown come again.
    warnings.filters[:] = filters  # type: ignore[index]
    warnings.simplefilter("default", category=_Nothing, append=True)
    warnings.filters.pop()  # type: ignore[attr-defined]


class _Nothing(Warning):
    """Never raised: adding and removing its filter tells the interpreter that the list has changed."""


def _signals() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def _set_signals(handlers: dict[int, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def _set_environment(variables: dict[str, str]) -> None:
    # One by one: other threads must not find it empty.
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return None


def _set_folder(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


# How to read a switch and how to write it; written only where it has changed, because some writes cost or warn.
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda state: torch.autograd.set_detect_anomaly(*state),
    ),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (_precisions, _set_precisions),
    *(
        (partial(getattr, part, name), partial(setattr, part, name))
        for part, name in (
            (_backends.cudnn, "enabled"),
            (_backends.cudnn, "benchmark"),
            (_backends.cudnn, "deterministic"),
            (_backends.mkldnn, "enabled"),
            (_backends.mkldnn, "deterministic"),
        )
    ),
    (np.geterr, lambda state: np.seterr(**state)),
    (lambda: list(warnings.filters), _set_filters),
    (_signals, _set_signals),
    (lambda: dict(os.environ), _set_environment),
    (_folder, _set_folder),
)


def device_of(model: nn.Module) -> torch.device:
    """Where its first parameter is."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def random_states() -> list[Callable[[], object]]:
    """What puts the random states back that are now, one call for each generator."""
    found: list[Callable[[], object]] = [
        partial(torch.random.set_rng_state, torch.random.get_rng_state()),
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),  # noqa: NPY002  # that of the user's code
    ]
    for accelerator in (_torch.cuda, _torch.xpu):
        if accelerator.is_initialized():
            devices = range(accelerator.device_count())
            found += [partial(accelerator.set_rng_state, accelerator.get_rng_state(one), one) for one in devices]
    if torch.backends.mps.is_available():
        found.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return found


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Guard random states, modes, switches, hooks of all modules, environment and signal handlers.

    Inside, gradients are on, autocast and inference mode are off, whatever the caller has; hooks that the caller gave
    to all modules (``register_module_forward_hook`` and its like) or to tensors saved for the backward pass do not run;
    and modes of torch that the caller is in, such as a counter of operations, see none of the snapshot, so that what
    they change in the network's operations is not in it either. Her default device stays. Not guarded: what a probe
    does to objects of its author, to files, and to modules of Python that it patches.
    """
    with ExitStack() as stack:
        # First, since reading and writing a switch may be operations.
        stack.enter_context(without_modes())
        stack.enter_context(_without_saved_tensors_hooks())
        switches = [read() for read, _ in _SWITCHES]
        # Each by itself, so that one that cannot be put back keeps none of the others from it.
        for (read, write), value in zip(_SWITCHES, switches, strict=True):
            stack.callback(_restore, read, write, value)
        for put_back in random_states():
            stack.callback(put_back)
        stack.enter_context(_without_global_hooks())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", device_of(model).type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _restore(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> None:
    if read() != value:
        write(value)


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Take off what was given to all modules, hooks and the cache of parametrizations, and give back exactly it."""
    # There is no public list of the hooks.
    tables = {name: table for name, table in vars(modules).items() if name.startswith("_global_")}
    kept = {name: dict(table) for name, table in tables.items() if isinstance(table, dict)}
    cached = parametrize._cache_enabled, parametrize._cache
    for name in kept:
        tables[name].clear()
    # Whether the hooks of the backward pass are the full ones; torch refuses a mixture.
    modules._global_is_full_backward_hook = None
    # By the id of a module: a clone at the address of an earlier one would get the weights of that one.
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = cached
        modules._global_is_full_backward_hook = tables["_global_is_full_backward_hook"]
        for name, hooks in kept.items():
            tables[name].clear()
            tables[name].update(hooks)


@contextmanager
def without_modes() -> Iterator[None]:
    """Take off the modes that see or replace operations, and give back exactly them, with the default device.

    The default device is a mode of functions, too, and the only kind that stays: it says where things are made.
    """
    modes = [_C._get_function_stack_at(place) for place in range(_C._len_torch_function_stack())]
    default = getattr(_torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    current = _device.CURRENT_DEVICE
    _set_function_modes([mode for mode in modes if isinstance(mode, _device.DeviceContext)])
    try:
        with _python_dispatch._disable_current_modes():
            try:
                yield
            finally:
                while _C._len_torch_dispatch_stack():  # what a probe has entered and not left
                    _C._pop_torch_dispatch_stack(None)
    finally:
        _set_function_modes(modes)
        _torch._GLOBAL_DEVICE_CONTEXT.device_context, _device.CURRENT_DEVICE = default, current


def _set_function_modes(modes: list[Any]) -> None:
    while _C._len_torch_function_stack():
        _C._pop_torch_function_stack()
    for mode in modes:
        _C._push_on_torch_function_stack(mode)


@contextmanager
def _without_saved_tensors_hooks() -> Iterator[None]:
    """Take off the hooks on saved tensors, and give back exactly them; torch.func refuses to work under any."""
    hooks = _taken_saved_tensors_hooks()
    try:
        yield
    finally:
        _taken_saved_tensors_hooks()
        for pair in reversed(hooks):
            _C._autograd._push_saved_tensors_default_hooks(*pair)


def _taken_saved_tensors_hooks() -> list[tuple[Any, Any]]:
    """Pairs of hooks, the innermost first."""
    taken = []
    while (pair := _C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        taken.append(pair)
        _C._autograd._pop_saved_tensors_default_hooks()
    return taken
