"""Runs probes on one state of the network and checks what they return against what they declared."""

from __future__ import annotations

import time
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..clone import structural_clone
from ..errors import NtkdynError, ProbeError
from ..gates import gates, weights
from ..kernel import resolve_parameters
from ..probe import Bands, Field, Probe, Snapshot
from ..store.declare import declared
from ..store.segment import Array, Declaration
from .arrays import checked_arrays
from .determinism import check_forward
from .guard import device_of, undisturbed
from .guarded_bands import FailedBands, guarded
from .passes import Loss, Pass
from .snapshots import BatchNorm, Forward, ProbeSet, reestimate
from .watches import Watched

OnError = Literal["raise", "warn", "disable"]
Records = dict[str, Mapping[str, Array | Bands]]


class Observer:
    """Shows one state of the network to probes.

    ``parameters`` are resolved at the first observation and stay; then determinism and independence of the samples are
    checked too. Kernels are checked against plain autograd when they are first taken, and again in a state of the
    network that has not been checked yet: other training flags, other parameters that learn, frozen slopes, other
    modules.

    Args: checked_kernels: those that have passed; shared by the observers of networks that are built alike.
    """

    def __init__(
        self,
        model: nn.Module,
        sets: Mapping[str, ProbeSet],
        *,
        forward: Forward,
        loss: Loss | None,
        batchnorm: BatchNorm,
        calibration: Any,
        parameters: Iterable[str] | None,
        on_error: OnError,
        checked_kernels: set[Hashable] | None = None,
    ) -> None:
        self._model = model
        self._sets = sets
        self._forward = forward
        self._loss = loss
        self.batchnorm = batchnorm
        self._calibration = calibration
        # A single string stays one, for resolve_parameters to refuse it.
        self._wanted = parameters if parameters is None or isinstance(parameters, str) else tuple(parameters)
        self._on_error = on_error
        self._checked: set[str] = set()
        self._checked_kernels = set() if checked_kernels is None else checked_kernels
        self._with_preactivations: set[str] = set()
        self.parameters: tuple[str, ...] | None = None
        self.seconds: dict[str, float] = {}
        self.declarations: dict[str, Declaration] = {}

    def resolve(self) -> None:
        """Resolve the names of the parameters before the first observation, as a run that is continued needs them."""
        if self.parameters is None:
            with undisturbed(self._model):
                self.parameters = self._resolved(structural_clone(self._model))

    def observe(self, step: int, epoch: float | None, watches: Sequence[Watched]) -> Records:
        """Measure the probes and return their arrays by group; what failed is left out, as on_error says.

        That they are recorded, the watches have to be told when they are.

        ``seconds`` are then those that each group took, without self-checks.

        Raises: ProbeError: a probe failed and on_error is "raise".  NondeterministicForward.
        """
        records: Records = {}
        self.seconds = {}
        with undisturbed(self._model):
            device = device_of(self._model)
            clone = structural_clone(self._model).eval()
            if self.parameters is None:
                self.parameters = self._resolved(clone)
            if self.batchnorm == "reestimate":
                reestimate(clone, tree_map(lambda leaf: leaf.to(device), self._calibration), self._forward)
            passes: dict[str, Pass] = {}
            for watched in watches:
                for name in watched.sets:
                    started = time.perf_counter()
                    if name not in passes:
                        passes[name] = self._pass(clone, self._sets[name].to(device))
                    arrays = self._measured(watched, passes[name], self._sets[name].to(device), clone, step, epoch)
                    if arrays is not None:
                        records[watched.group(name)] = arrays
                    # Without the self-checks, so that it tells what the next snapshots cost.
                    taken = time.perf_counter() - started - passes[name].seconds_checking
                    passes[name].seconds_checking = 0.0
                    self.seconds[watched.group(name)] = taken
                watched.seconds = sum(self.seconds[watched.group(name)] for name in watched.sets)
            self._with_preactivations |= {name for name, one in passes.items() if one.with_preactivations}
        return records

    def _resolved(self, clone: nn.Module) -> tuple[str, ...]:
        if self._wanted is not None:
            return resolve_parameters(clone, self._wanted)
        learning = {
            id(parameter)
            for parameter in weights(self._model).values()
            if parameter.requires_grad and parameter.is_floating_point()
        }
        # Clone and network hold their parameters in the same order; the clone's names are those without wrappers.
        pairs = zip(clone.named_parameters(), self._model.parameters(), strict=True)
        return tuple(name for (name, _), live in pairs if id(live) in learning)

    def _pass(self, clone: nn.Module, probe_set: ProbeSet) -> Pass:
        if probe_set.name not in self._checked:
            check_forward(clone, probe_set, self._forward)
            self._checked.add(probe_set.name)
        return Pass(
            clone,
            probe_set,
            forward=self._forward,
            loss=self._loss,
            parameters=self.parameters or (),
            with_preactivations=probe_set.name in self._with_preactivations,
            checked=self._checked_kernels,
            state=self._state(clone),
        )

    def _state(self, clone: nn.Module) -> Hashable:
        """What the routes of the kernel may depend on besides the inputs and the values of the parameters."""
        training = tuple(module.training for module in self._model.modules())
        # Slopes count only where they are in the kernel: a linearizer freezes some at nearly every step, and they learn
        # for a while only. All parameters of the clone, which the kernel is taken on, have requires_grad.
        wanted = set(self.parameters or ())
        others = {id(gate.slope) for name, gate in gates(self._model).items() if f"{name}.slope" not in wanted}
        learning = tuple(one.requires_grad for one in self._model.parameters() if id(one) not in others)
        frozen = tuple(bool(gate.frozen.any()) for name, gate in gates(clone).items() if f"{name}.slope" in wanted)
        return training, learning, frozen, self.parameters, self._make(clone)

    def _make(self, clone: nn.Module) -> Hashable:
        """What tells networks from others that are built otherwise; several recorders may share what they checked."""
        modules = tuple((name, type(module), _settings(module)) for name, module in clone.named_modules())
        parameters = tuple((name, one.shape, one.dtype, one.device) for name, one in clone.named_parameters())
        return modules, parameters, self._forward, self.batchnorm

    def _measured(
        self, watched: Watched, shared: Pass, probe_set: ProbeSet, clone: nn.Module, step: int, epoch: float | None
    ) -> dict[str, Array | Bands] | None:
        """The probe's arrays for one probe set, or None where it is or becomes disabled, or failed."""
        if watched.disabled:
            return None
        group = watched.group(probe_set.name)
        where = f"probe {watched.name!r}{f', set {probe_set.name!r}' if group != watched.name else ''}, step {step}"
        last = watched.last.setdefault(group, {})
        # Copies of everything that is shared: a probe that works in place must not spoil it for the next one.
        snapshot = Snapshot(
            step=step,
            epoch=epoch,
            model=lambda: structural_clone(clone, share_parameters=False).eval(),
            inputs=tree_map(Tensor.clone, probe_set.inputs),
            targets=None if probe_set.targets is None else probe_set.targets.clone(),
            set=probe_set.name,
            parameters=self.parameters or (),
            forward=lambda: shared.outputs().clone(),
            loss=shared.loss,
            preactivations=lambda: {name: value.clone() for name, value in shared.preactivations().items()},
            kernel=lambda reduce, per: tree_map(Tensor.clone, shared.kernel(reduce, per)),
            kernel_bands=shared.kernel_bands,
            previous=last.get,
        )
        try:
            # Each probe by itself, so that what one switches does not reach the next.
            with undisturbed(self._model):
                if group not in watched.fields:
                    watched.fields[group] = self._declared(watched.probe, snapshot, group, where)
                arrays = checked_arrays(watched.probe.measure(snapshot), watched.fields[group], last, where)
        except Exception as error:
            self._failed(watched, error, where)
            return None
        return {
            name: guarded(array, watched, group, name, where, self._model) if isinstance(array, Bands) else array
            for name, array in arrays.items()
        }

    def failed(self, failure: FailedBands) -> None:
        """Do with a probe whose bands failed what on_error says.  Raises: ProbeError: it says "raise"."""
        self._failed(failure.watched, failure.error, failure.where)

    def _declared(self, probe: Probe, snapshot: Snapshot, group: str, where: str) -> dict[str, Field]:
        given: Any = probe.fields(snapshot)
        if not isinstance(given, Iterable) or isinstance(given, (str, Mapping)):
            raise ProbeError(f"{where}: fields() gave {type(given).__name__}, expected a list of ntkdyn.Field objects")
        fields = list(given)
        if not fields:
            raise ProbeError(f"{where}: fields() gave none, expected at least one; declare what measure() returns")
        for one in fields:
            if not isinstance(one, Field):
                raise ProbeError(f"{where}: fields() gave {type(one).__name__}, expected ntkdyn.Field objects")
        self.declarations[group] = declared(self.declarations, group, fields, {}, stepped=True)
        return {one.name: one for one in fields}

    def _failed(self, watched: Watched, error: Exception, where: str) -> None:
        if isinstance(error, ProbeError) and str(error).startswith(where):
            failure = error
        else:
            kind = "" if isinstance(error, NtkdynError) else f"{type(error).__name__}: "
            failure = ProbeError(f"{where}: {kind}{' '.join(str(error).split())}")
            failure.__cause__ = error
        if self._on_error == "raise":
            raise failure
        what = "its value is left out"
        if self._on_error == "disable":
            watched.disabled = True
            what = "the probe is switched off"
        warnings.warn(f"{failure}; {what}, training goes on", RuntimeWarning, stacklevel=2)


def _settings(module: nn.Module) -> str:
    try:
        return module.extra_repr()
    except Exception:  # the user's own; then its class has to do
        return ""
