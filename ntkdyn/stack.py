"""Trainings of chains of equal shape as one, each with the bits that it has alone.

Networks of 64 units a layer spend as much time between products as in them. Stacked, five of them take a third less,
and every number stays what it was: a product of a stack is the stack of the products. That is no promise of torch, so
it is looked at, bit by bit, whenever a stack is made; where it does not hold, each trains alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .adam import AVERAGES, Adam, FusedSteps
from .chain import WHOLE_LINES, Chain, Losses, StackedChain
from .experiment import Stage
from .training_loop import TrainingLoop

_requires_grad = operator.attrgetter("requires_grad")


def alike(stages: Sequence[Stage]) -> bool:
    """Whether these are trainings by one rule, and so of chains that are stacked perhaps."""
    rules = {_rule(stage) for stage in stages}
    # Several threads divide the numbers of a stack otherwise.
    return len(rules) == 1 and None not in rules and torch.get_num_threads() == 1


def _rule(stage: Stage) -> Hashable:
    """What trainings must have in common beside their networks; None for those that are not stacked."""
    if not isinstance(stage, TrainingLoop) or stage.objective is not None:
        return None
    if type(stage.optimizer) is not Adam or not stage.optimizer.is_plain:
        return None
    # Before a step somebody looks at gradients, which the optimizer does not have then, or has put one of his own.
    if stage.optimizer._optimizer_step_pre_hooks or "step" in vars(stage.optimizer):
        return None
    options = repr(sorted(_options(stage).items()))
    return stage.batch_size, stage.steps_per_epoch, stage.first_step, stage.last_step, stage.loss, options


def _options(loop: TrainingLoop) -> dict[str, Any]:
    group = loop.optimizer.param_groups[0]
    return {name: value for name, value in group.items() if name not in ("params", "lr")}


class Stack:
    """Chains as one, and their Adam as one: weights and averages of the loops are parts of its tensors until ``part``.

    Small parameters are stacked for products, and updated one by one. The optimizers of the loops take no steps; who
    follows them is told by ``tell_of_step``.
    """

    def __init__(self, loops: Sequence[TrainingLoop]) -> None:
        self._loops = list(loops)
        self._chains = _chains(loops)
        self._tensors = [_flat(chain.tensors) for chain in self._chains]
        self._all = [one for tensors in self._tensors for one in tensors]
        self._learn = [one.requires_grad for one in self._tensors[0]] * len(self._tensors)
        self._stacked = StackedChain(self._chains)
        self._places = [one.data_ptr() for one in self._all]
        self._options = _options(loops[0])
        self._groups = [dict(loop.optimizer.param_groups[0]) for loop in loops]
        stepped = {id(one) for loop in loops for one in _parameters(loop)}
        weights = [(stack, parts) for stack, parts in self._stacked.weights if id(parts[0]) in stepped]
        # Loops over numbers treat the last few, which fill no register, otherwise; in a stack these would be others.
        self._large = [(stack, parts) for stack, parts in weights if parts[0].numel() % WHOLE_LINES == 0]
        self._small = [(stack, parts) for stack, parts in weights if parts[0].numel() % WHOLE_LINES]
        self._stack_of = {part: stack for stack, parts in self._large for part in parts}
        small = [part for _, parts in self._small for part in parts]
        states: dict[Tensor, Mapping[str, Tensor]] = {
            part: loop.optimizer.state.get(part, {}) for loop in loops for part in _parameters(loop)
        }
        of_stacks = [_stacked_states([states[part] for part in parts]) for _, parts in self._large]
        self._steps = FusedSteps(
            [*(stack for stack, _ in self._large), *small],
            self._options,
            [*of_stacks, *(states[part] for part in small)],
        )
        self._states = _states(loops)
        self._shared = False

    @classmethod
    def of(cls, loops: Sequence[TrainingLoop], batches: Sequence[tuple[Any, Tensor]]) -> Stack | None:
        """Stack the chains; None where there are none of equal shape, or where one bit of a step would be another."""
        if len(set(map(_shape, loops, batches))) > 1 or len(_chains(loops)) < len(loops):
            return None
        stack = cls(loops)
        same = False
        try:
            same = bool(stack._large) and stack._keeps_every_bit(batches)
        finally:
            if not same:
                stack.part()
        return stack if same else None

    def holds(self, loops: Sequence[TrainingLoop]) -> bool:
        """Whether the loops still have the tensors, states and options of the stack, and the same tensors learn."""
        chains = _chains(loops)
        if len(chains) < len(loops):
            return False
        if any(one is not other for one, other in zip(chains, self._chains, strict=True)):
            # A new epoch.
            if not all(map(_same, [_flat(chain.tensors) for chain in chains], self._tensors)):
                return False
            self._chains = chains
        rate = _rate(loops[0])
        for loop, known in zip(loops, self._groups, strict=True):
            known["lr"] = rate
            group = loop.optimizer.param_groups[0]
            # Lists of tensors cannot be compared by their values.
            if group["params"] is not known["params"] or group != known:
                return False
        return (
            list(map(_requires_grad, self._all)) == self._learn
            and list(map(Tensor.data_ptr, self._all)) == self._places
            and all(map(_same, _states(loops), self._states))
        )

    def losses(self, batches: Sequence[tuple[Any, Tensor]]) -> Losses:
        """Losses of the loops on their batches."""
        inputs, targets = zip(*batches, strict=True)
        return self._stacked.losses(inputs, targets, self._loops[0].loss)

    def step(self, send_back: Callable[[], None]) -> None:
        """Move all weights."""
        send_back()
        for stack, parts in self._small:
            for number, part in enumerate(parts):
                part.grad = _part(stack.grad, number)
        self._steps.step(_rate(self._loops[0]))
        for _, parts in self._small:
            for part in parts:
                part.grad = None
        if not self._shared:
            self._share_averages()

    def part(self) -> None:
        """Give every loop tensors of its own again."""
        self._stacked.part()
        for loop in self._loops:
            for part, state in loop.optimizer.state.items():
                loop.optimizer.state[part] = {name: value.clone() for name, value in state.items()}

    def _share_averages(self) -> None:
        # In the order in which the optimizer of a loop would make them, which is that of its checkpoint.
        for number, loop in enumerate(self._loops):
            for part in _parameters(loop):
                state = self._steps.states.get(self._stack_of.get(part, part))
                if state and part in self._stack_of:
                    state = {"step": state["step"], **{name: state[name][number] for name in AVERAGES}}
                if state:
                    loop.optimizer.state[part] = state
        self._states = _states(self._loops)
        self._shared = True

    def _keeps_every_bit(self, batches: Sequence[tuple[Any, Tensor]]) -> bool:
        """Whether losses, gradients and one step of Adam are those that each chain has by itself; nothing is moved.

        Of operations that depend on nothing but shapes and places, one step stands for the others.
        """
        self._forget_gradients()
        losses = self.losses(batches)
        losses.send_back()
        values = losses.each()
        stacks = [_copy(stack) for stack, _ in self._large]
        of_stacks = [_copies(self._steps.states.get(stack, {})) for stack, _ in self._large]
        FusedSteps(stacks, self._options, of_stacks).step(_rate(self._loops[0]))
        same = True
        for number, (loop, chain, batch) in enumerate(zip(self._loops, self._chains, batches, strict=True)):
            slopes = [slope for slope in self._tensors[number] if slope.grad is not None]
            of_slopes = [slope.grad for slope in slopes]
            value, send_back = chain.loss(*batch, loop.loss)
            send_back()
            alone = [parts[number] for _, parts in self._stacked.weights]
            together = [_part(stack.grad, number) for stack, _ in self._stacked.weights]
            same &= _same_bits([value, *(part.grad for part in alone)], [values[number], *together])
            same &= _same_bits([slope.grad for slope in slopes], of_slopes)
            large = [parts[number] for _, parts in self._large]
            copies = [_copy(part) for part in large]
            adam = Adam(copies, learning_rate=_rate(loop))
            adam.param_groups[0].update(_options(loop))
            adam.state.update(zip(copies, [_copies(loop.optimizer.state.get(part, {})) for part in large], strict=True))
            adam.step()
            same &= _same_bits(copies, [stack[number] for stack in stacks])
        self._forget_gradients()
        return same

    def _forget_gradients(self) -> None:
        for tensor in self._all:
            tensor.grad = None


def tell_of_step(optimizer: torch.optim.Optimizer) -> None:
    """Call the hooks of a step that was taken for an optimizer; a step without gradients would too, but slowly."""
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    for hook in (*_global_optimizer_pre_hooks.values(), *before.values()):
        hook(optimizer, (optimizer,), {})
    for hook in (*after.values(), *_global_optimizer_post_hooks.values()):
        hook(optimizer, (optimizer,), {})


def _chains(loops: Sequence[TrainingLoop]) -> list[Chain]:
    return [loop.chain for loop in loops if loop.chain is not None]


def _parameters(loop: TrainingLoop) -> list[nn.Parameter]:
    parameters: list[nn.Parameter] = loop.optimizer.param_groups[0]["params"]
    return parameters


def _rate(loop: TrainingLoop) -> float:
    return float(loop.optimizer.param_groups[0]["lr"])


def _shape(loop: TrainingLoop, batch: tuple[Any, Tensor]) -> Hashable:
    """What loops of one stack must have in common at this step."""
    if loop.chain is None:
        return None
    layers = [
        [None if one is None else (one.shape, one.dtype, one.requires_grad) for one in tensors]
        for tensors in loop.chain.tensors
    ]
    steps = [
        None if (state := loop.optimizer.state.get(one)) is None else float(state["step"]) for one in _parameters(loop)
    ]
    inputs, targets = batch
    return repr((layers, steps, _rate(loop), inputs.shape, targets.shape, targets.dtype))


def _states(loops: Sequence[TrainingLoop]) -> list[list[Any]]:
    # By their values: a key is a tensor, which is slow to be looked up.
    return [list(loop.optimizer.state.values()) for loop in loops]


def _stacked_states(states: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    if not states[0]:
        return {}
    return {"step": states[0]["step"], **{name: torch.stack([one[name] for one in states]) for name in AVERAGES}}


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    copy.grad = tensor.grad
    return copy


def _part(stack: Tensor | None, number: int) -> Tensor | None:
    return None if stack is None else stack[number]


def _flat(layers: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in layer if tensor is not None]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _same_bits(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    return all(
        one is other if one is None or other is None else _equal(one, other)
        for one, other in zip(found, expected, strict=True)
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    # One of them may be about to diverge.
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
