"""Seeds trained as one: every bit that each has alone, whatever happens to the others."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkdyn import stack
from ntkdyn.adam import Adam
from ntkdyn.datasets import Dataset
from ntkdyn.errors import DivergedTraining
from ntkdyn.experiment import Stages, finish
from ntkdyn.experiments.networks import GatedMLP
from ntkdyn.gates import gates, learn_slopes, weights
from ntkdyn.recorder import Recorder
from ntkdyn.together import finish_together
from ntkdyn.training_loop import TrainingLoop

STEPS, PER_EPOCH = 14, 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Seed:
    """A small gated network whose slopes learn for a while, move and freeze, with an optimizer that is reset once."""

    def __init__(self, seed: int, *, width: int = 16, bad_from: int = 99, after: Callable[[int], None] | None = None):
        torch.manual_seed(seed)
        self.seed, self.bad_from, self.after = seed, bad_from, after
        self.model = GatedMLP(8, 10, width=width, depth=2)
        learn_slopes(self.model, False)
        self.optimizer = Adam(weights(self.model).values(), learning_rate=1e-2)
        self.drawn: list[float] = []

    def epoch(self, epoch: int) -> Dataset:
        generator = torch.Generator().manual_seed(100 * self.seed + epoch)
        inputs = torch.randn(PER_EPOCH * 8, 8, generator=generator)
        if epoch >= self.bad_from:
            inputs[8:] = torch.inf
        return Dataset(inputs, torch.randint(10, (PER_EPOCH * 8,), generator=generator), 10)

    def after_step(self, step: int) -> None:
        self.drawn.append(float(torch.rand(())))
        if step == 3:
            learn_slopes(self.model, True)
        for number, gate in enumerate(gates(self.model).values()):
            if gate.slope.grad is not None:
                with torch.no_grad():
                    gate.slope -= 0.3 * gate.slope.grad
                gate.slope.grad = None
            if step == 5 + self.seed % 3:
                gate.freeze(torch.arange(gate.channels) % (2 + number) == 0)
        if step == 9:
            learn_slopes(self.model, False)
            self.optimizer.state.clear()
        if self.after is not None:
            self.after(step)

    def loop(self) -> TrainingLoop:
        return TrainingLoop(
            model=self.model,
            optimizer=self.optimizer,
            epoch_data=self.epoch,
            batch_size=8,
            steps_per_epoch=PER_EPOCH,
            last_step=STEPS,
            seed=self.seed,
            learning_rate=lambda step: 1e-2 / (1 + step),
            after_step=self.after_step,
        )

    def stages(self) -> Stages:
        print(f"seed {self.seed} begins", file=sys.stderr)
        yield self.loop()
        print(f"seed {self.seed} ends", file=sys.stderr)
        return {"seed": float(self.seed)}

    @property
    def numbers(self) -> list[Tensor]:
        """Weights, slopes and frozen flags, the averages of Adam, and what was drawn."""
        averages = [self.optimizer.state.get(one, {}) for one in weights(self.model).values()]
        return [
            *self.model.state_dict().values(),
            *(value for state in averages for _, value in sorted(state.items())),
            torch.tensor(self.drawn),
        ]


def assert_same(found: Seed, expected: Seed) -> None:
    for one, other in zip(found.numbers, expected.numbers, strict=True):
        assert torch.equal(one, other)
    for one in found.model.state_dict().values():
        # A tensor of its own again.
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size()


def together(seeds: list[Seed]) -> tuple[list[Any], list[str]]:
    said = [io.StringIO() for _ in seeds]
    outcomes = finish_together([(one.stages(), text) for one, text in zip(seeds, said, strict=True)])
    return outcomes, [text.getvalue() for text in said]


@pytest.mark.parametrize("width", [16, 5, 24, 64])
def test_every_bit_is_that_of_a_training_alone(stacked: list[int], width: int) -> None:
    found = [Seed(seed, width=width) for seed in range(4)]
    torch.manual_seed(77)
    outcomes, said = together(found)
    after = torch.rand(())
    assert outcomes == [{"seed": float(seed)} for seed in range(4)]
    assert said == [f"seed {seed} begins\nseed {seed} ends\n" for seed in range(4)]
    for one in found:
        alone = Seed(one.seed, width=width)
        finish(alone.stages())
        assert_same(one, alone)
    # 5 x 8, 5 x 5 and 10 x 5 weights fill no registers, so that nothing is left to stack.
    assert stacked == ([] if width == 5 else [4] * STEPS)
    torch.manual_seed(77)
    assert after == torch.rand(())


def incomplete(number: int, left_out: int) -> Seed:
    """A seed with so many targets of each batch left out."""
    one = Seed(number)
    own = one.epoch

    def epoch(number_of_it: int) -> Dataset:
        data = own(number_of_it)
        data.targets.view(PER_EPOCH, 8)[:, :left_out] = -100
        return data

    one.epoch = epoch  # type: ignore[method-assign]
    return one


@pytest.mark.parametrize("left_out", [(0, 0, 0), (2, 2, 2), (0, 3, 1)])
def test_targets_that_are_left_out(stacked: list[int], left_out: tuple[int, ...]) -> None:
    """Each loss is a mean over the targets of its own network that count."""

    found = [incomplete(number, left_out[number]) for number in range(3)]
    together(found)
    assert stacked
    for one in found:
        alone = incomplete(one.seed, left_out[one.seed])
        finish(alone.stages())
        assert_same(one, alone)


def test_all_targets_left_out(stacked: list[int]) -> None:
    """The mean over nothing is no number, although it adds nothing to the sum over the networks."""
    found = [incomplete(number, 8 if number == 1 else 0) for number in range(3)]
    outcomes, _ = together(found)
    assert "found loss nan at step 0" in str(outcomes[1])
    assert stacked == [2] * STEPS
    for number in (0, 2):
        alone = Seed(number)
        finish(alone.stages())
        assert_same(found[number], alone)


def test_one_that_diverges_does_not_touch_the_others(stacked: list[int]) -> None:
    found = [Seed(seed, bad_from=2 if seed == 1 else 99) for seed in range(3)]
    outcomes, _ = together(found)
    alone = Seed(1, bad_from=2)
    with pytest.raises(DivergedTraining) as expected:
        finish(alone.stages())
    assert str(outcomes[1]) == str(expected.value)
    assert "at step 9" in str(outcomes[1])
    assert_same(found[1], alone)
    for number in (0, 2):
        alone = Seed(number)
        finish(alone.stages())
        assert_same(found[number], alone)
    assert stacked == [3] * 9 + [2] * (STEPS - 9)


def test_what_is_wrong_with_one_batch_stays_with_it(stacked: list[int]) -> None:
    def spoiled(seed: Seed) -> Seed:
        epoch = seed.epoch

        def other(number: int) -> Dataset:
            data = epoch(number)
            if number == 2:
                data.targets[9] = 99
            return data

        seed.epoch = other  # type: ignore[method-assign]
        return seed

    found = [Seed(0), spoiled(Seed(1)), Seed(2)]
    outcomes, _ = together(found)
    assert isinstance(outcomes[1], IndexError)
    assert len(stacked) == 9
    for number in (0, 2):
        alone = Seed(number)
        finish(alone.stages())
        assert_same(found[number], alone)


@pytest.mark.parametrize(
    "change",
    [
        lambda seed: seed.model.linear2.weight.requires_grad_(False),
        lambda seed: seed.optimizer.param_groups[0].update(weight_decay=0.1),
        lambda seed: seed.optimizer.load_state_dict(seed.optimizer.state_dict()),
        lambda seed: setattr(seed.model.linear2.weight, "data", seed.model.linear2.weight.data.clone()),
        lambda seed: seed.optimizer.state.pop(seed.model.linear2.weight),
        lambda seed: seed.model.linear1.weight.requires_grad_(seed.optimizer.param_groups[0]["lr"] < 2e-3),
    ],
    ids=["a weight rests", "weight decay", "a state is loaded", "other data", "one state is gone", "a weight wakes"],
)
@pytest.mark.parametrize("of_all", [True, False])
def test_what_changes_on_the_way(change: Callable[[Seed], Any], of_all: bool) -> None:
    """Whatever is done to weights and optimizer after a step, to one or to all: as it is alone."""

    def changed(number: int) -> Seed:
        def after(step: int) -> None:
            if step in (4, 7) and (of_all or number == 1):
                change(seed)

        seed = Seed(number, after=after)
        return seed

    found = [changed(number) for number in range(3)]
    outcomes, _ = together(found)
    assert not any(isinstance(one, Exception) for one in outcomes)
    for one in found:
        alone = changed(one.seed)
        finish(alone.stages())
        assert_same(one, alone)


def test_who_looks_before_the_step_sees_gradients(stacked: list[int]) -> None:
    def clipped(number: int) -> Seed:
        seed = Seed(number)
        seed.optimizer.register_step_pre_hook(
            lambda *_: torch.nn.utils.clip_grad_norm_(weights(seed.model).values(), 0.1) and None
        )
        return seed

    found, alone = [clipped(0), clipped(1)], [clipped(0), clipped(1)]
    together(found)
    assert not stacked
    for one, other in zip(found, alone, strict=True):
        finish(other.stages())
        assert_same(one, other)


def test_a_training_that_is_done_draws_no_batch() -> None:
    drawn = []

    def done(number: int) -> Seed:
        seed = _changed(Seed(number), "first_step", STEPS)
        seed.epoch = drawn.append  # type: ignore[assignment]
        return seed

    def stages(seed: Seed) -> Stages:
        loop = seed.loop()
        loop.step = STEPS
        yield loop
        return {}

    assert finish_together([(stages(done(one)), io.StringIO()) for one in range(2)]) == [{}, {}]
    assert not drawn


def test_one_that_raises_does_not_touch_the_others() -> None:
    def fails(step: int) -> None:
        if step == 6:
            raise ValueError("broken probe")

    found = [Seed(0), Seed(1, after=fails), Seed(2)]
    outcomes, _ = together(found)
    assert isinstance(outcomes[1], ValueError)
    for number in (0, 2):
        alone = Seed(number)
        finish(alone.stages())
        assert_same(found[number], alone)


def test_where_bits_differ_each_trains_alone(stacked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "_same_bits", lambda found, expected: False)
    found = [Seed(seed) for seed in range(3)]
    together(found)
    assert not stacked
    for one in found:
        alone = Seed(one.seed)
        finish(alone.stages())
        assert_same(one, alone)


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(lambda: Seed(1, width=17), id="another width"),
        pytest.param(lambda: _changed(Seed(1), "objective", lambda step, x, y: Seed(1).model(x).sum()), id="objective"),
        pytest.param(lambda: _changed(Seed(1), "batch_size", 4), id="another batch size"),
        pytest.param(lambda: _changed(Seed(1), "learning_rate", lambda step: 1e-3), id="another rate"),
        pytest.param(lambda: _with_sgd(Seed(1)), id="another optimizer"),
        pytest.param(lambda: _with_a_step_of_its_own(Seed(1)), id="a step that somebody put"),
    ],
)
def test_unlike_ones_train_alone(stacked: list[int], odd: Callable[[], Seed]) -> None:
    found, alone = [Seed(0), odd()], [Seed(0), odd()]
    outcomes, _ = together(found)
    assert not stacked
    assert not any(isinstance(one, Exception) for one in outcomes)
    for one, other in zip(found, alone, strict=True):
        finish(other.stages())
        assert_same(one, other)


def _changed(seed: Seed, name: str, value: Any) -> Seed:
    loop = seed.loop

    def changed() -> TrainingLoop:
        made = loop()
        setattr(made, name, value)
        return made

    seed.loop = changed  # type: ignore[method-assign]
    return seed


def _with_sgd(seed: Seed) -> Seed:
    seed.optimizer = torch.optim.SGD(weights(seed.model).values(), lr=0.1)  # type: ignore[assignment]
    return seed


def _with_a_step_of_its_own(seed: Seed) -> Seed:
    # As a scheduler of learning rates does.
    seed.optimizer.step = seed.optimizer.step  # type: ignore[method-assign]
    return seed


def test_several_threads_train_alone(stacked: list[int]) -> None:
    torch.set_num_threads(2)
    together([Seed(0), Seed(1)])
    assert not stacked


def test_an_interruption_finds_all_at_one_step(tmp_path: Path) -> None:
    """A signal that comes while the first is told of a step waits until the last one has been told."""

    def interrupted(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    seeds = [Seed(0, after=interrupted), Seed(1), Seed(2)]
    recorders = [
        Recorder(one.model, ["units"], one.epoch(0)[:4], path=tmp_path / str(one.seed), schedule=lambda step: False)
        for one in seeds
    ]

    def stages(seed: Seed, recorder: Recorder) -> Stages:
        loop = seed.loop()
        loop.recorder = recorder
        yield loop
        return {}

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            finish_together([(stages(*pair), io.StringIO()) for pair in zip(seeds, recorders, strict=True)])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    for one, recorder in zip(seeds, recorders, strict=True):
        assert len(one.drawn) == 6
        assert recorder.step == 6
        assert json.loads((tmp_path / str(one.seed) / "run.json").read_text())["status"] == "interrupted"
        for tensor in one.model.state_dict().values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_a_divergence_is_not_lost(tmp_path: Path, number: signal.Signals) -> None:
    def stops(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), number)

    def diverges(step: int) -> None:
        if step == 4:
            raise DivergedTraining("after the step")

    seeds = [Seed(0, after=diverges), Seed(1, after=stops), Seed(2)]
    recorders = [
        Recorder(one.model, ["units"], one.epoch(0)[:4], path=tmp_path / str(one.seed), schedule=lambda step: False)
        for one in seeds
    ]
    told: list[str] = []

    def stages(seed: Seed, recorder: Recorder) -> Stages:
        loop = seed.loop()
        loop.recorder = recorder
        try:
            yield loop
        except BaseException as error:
            told.append(type(error).__name__)
            raise
        return {}

    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    try:
        with pytest.raises(expected):
            finish_together([(stages(*pair), io.StringIO()) for pair in zip(seeds, recorders, strict=True)])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) == before[1]
    finally:
        for one, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(one, handler)
    assert told == ["DivergedTraining", expected.__name__, expected.__name__]
    assert [recorder.step for recorder in recorders] == [3, 6, 6]
    status = [json.loads((tmp_path / str(one) / "run.json").read_text())["status"] for one in (1, 2)]
    assert status == ["interrupted", "interrupted"]


def test_stages_are_told_what_a_training_raised() -> None:
    class Fails:
        def run(self) -> None:
            raise DivergedTraining("no")

    class Passes:
        def run(self) -> None:
            return None

    def stages() -> Stages:
        try:
            yield Fails()
        except DivergedTraining:
            yield Passes()
        return {"told": 1.0}

    assert finish(stages()) == {"told": 1.0}
    assert finish_together([(stages(), io.StringIO()), (stages(), io.StringIO())]) == [{"told": 1.0}] * 2


def test_a_network_that_is_no_chain_trains_alone(stacked: list[int]) -> None:
    seeds = [Seed(0), Seed(1)]
    for one in seeds:
        one.model.register_forward_hook(lambda *_: None)
    together(seeds)
    assert not stacked
    assert all(len(one.drawn) == STEPS for one in seeds)


def test_modules_stay_what_they_were() -> None:
    seed = Seed(0)
    parameters = list(seed.model.parameters())
    together([seed, Seed(1)])
    assert all(one is other for one, other in zip(seed.model.parameters(), parameters, strict=True))
    assert all(isinstance(one, nn.Parameter) for one in parameters)
