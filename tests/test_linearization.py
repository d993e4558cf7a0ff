"""The protocol: threshold steps by brute force, exact counts, survivors, resuming, controls."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkdyn.conversion import gate_network
from ntkdyn.errors import ConfigurationError, DivergedTraining
from ntkdyn.gates import gates, nonlinear_units, slopes
from ntkdyn.linearization import (
    Linearizer,
    MaskRamp,
    SlopeReplay,
    clipped_step,
    half_threshold,
    random_mask,
    survivor_mask,
)


def network(*widths: int, granularity: Any = "channel", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, *(widths or (10, 10)))):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return gate_network(nn.Sequential(*layers, nn.Linear(outputs, 2)).double(), granularity=granularity)


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    return x, torch.stack([x.prod(1), x.square().sum(1)], 1)


def train(model: nn.Module, owner: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[int]:
    """Active units after each call."""
    counts = []
    for step in steps:
        x, y = data(step)
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
        owner.step()
        counts.append(nonlinear_units(model).active_total)
    return counts


def adam(owner: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(owner.weights(), lr=1e-2)


@pytest.mark.parametrize("amount", [1e-4, 0.01, 0.3])
def test_half_threshold_is_the_proximal_step(amount: float) -> None:
    distances = torch.cat([torch.linspace(0, 1.5, 61), torch.tensor([0.063])]).double()
    grid = torch.linspace(0, 1.6, 400_001, dtype=torch.float64)
    for distance, found in zip(distances, half_threshold(distances, amount), strict=True):
        if abs(distance - 1.5 * amount ** (2 / 3)) < 1e-3:
            continue  # two minima of nearly the same height
        cost = (grid - distance) ** 2 / 2 + amount * grid.sqrt()
        assert abs(grid[cost.argmin()] - found) < 1e-5


def test_clipped_step_is_the_formula_and_another_rule() -> None:
    distance = torch.tensor([1.0, 0.063, 1e-4, 1e-6, 0.0], dtype=torch.float64)
    expected = torch.tensor([0.995, 0.063 - 0.005 / 0.063**0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(clipped_step(distance, 0.01), expected)
    assert round(clipped_step(torch.tensor(0.063), 0.01).item(), 3) == 0.043
    assert half_threshold(torch.tensor(0.063), 0.01).item() == 0
    tiny = clipped_step(torch.tensor([1e-5], dtype=torch.float64), 1e-8)
    torch.testing.assert_close(tiny, torch.tensor([1e-5 - 1e-8 * 0.5 / 1e-2], dtype=torch.float64))
    assert torch.equal(half_threshold(torch.tensor([0.0, 0.5]), 0.0), torch.tensor([0.0, 0.5]))


def test_collapse_time_without_gradients() -> None:
    # d' = -eta lambda / (2 sqrt(d)): from 1 to 0 in 4 / (3 eta lambda) calls, 0.8 of the ramp at strength 1.
    model = network()
    linearizer = Linearizer(model, remaining=0, steps=500)
    counts = []
    while not linearizer.done:
        linearizer.step()
        counts.append(linearizer.active)
    assert next(step for step, count in enumerate(counts, 1) if count == 0) == pytest.approx(400, abs=8)


@pytest.mark.parametrize("rule", ["clipped", "half-threshold"])
@pytest.mark.parametrize("strength", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("remaining", [0, 3, 0.1, 20, 1.0])
def test_exact_count(rule: Any, strength: float, remaining: int | float) -> None:
    model = network()
    linearizer = Linearizer(model, remaining=remaining, steps=25, strength=strength, rule=rule)
    counts = train(model, linearizer, adam(linearizer), range(25))
    expected = remaining if isinstance(remaining, int) else round(20 * remaining)
    assert linearizer.done
    assert counts[-1] == expected
    assert counts == sorted(counts, reverse=True)
    assert all(((slope == 1) == gate.frozen).all() for slope, gate in zip(
        slopes(model).values(), gates(model).values(), strict=True))  # fmt: skip


def test_fixed_penalty_is_a_price_per_unit() -> None:
    # d' = -eta lambda / (2 sqrt(d)) with lambda = 0.04, eta = 0.5: 4 / (3 eta lambda) = 67 calls, whatever the steps.
    model = network()
    linearizer = Linearizer(model, penalty_weight=0.04, learning_rate=0.5, steps=200)
    counts = []
    while not linearizer.done:
        linearizer.step()
        counts.append(linearizer.active)
    assert next(step for step, count in enumerate(counts, 1) if count == 0) == pytest.approx(67, abs=2)
    assert linearizer.target == 0
    assert linearizer.penalty_weight == 0.04


@pytest.mark.parametrize("rule", ["clipped", "half-threshold"])
def test_a_higher_price_leaves_fewer_units(rule: Any) -> None:
    left = []
    for weight in (0.0, 0.02, 0.1, 1.0):
        model = network()
        linearizer = Linearizer(model, penalty_weight=weight, steps=60, rule=rule)
        counts = train(model, linearizer, adam(linearizer), range(60))
        assert counts == sorted(counts, reverse=True)
        left.append(counts[-1])
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-1]


def test_collapse_of_all_channels_together() -> None:
    # Without gradients all channels arrive in one call; exactly the asked number stays, with the slopes it had.
    model = network()
    linearizer = Linearizer(model, remaining=4, steps=10, strength=8)
    before = None
    while linearizer.active == 20:
        before = slopes(model)
        linearizer.step()
    assert linearizer.active == 4
    for name, gate in gates(model).items():
        assert before is not None
        assert torch.equal(gate.slope[~gate.frozen], before[name][~gate.frozen])
    for _ in range(5):
        linearizer.step()
    assert linearizer.active == 4


def test_one_step_moves_slopes_by_sgd_then_threshold_then_clamp() -> None:
    model = network(2)
    linearizer = Linearizer(model, remaining=0, steps=100, learning_rate=0.5)
    gate = gates(model)["1"]
    gate.slope.grad = torch.tensor([-0.8, 5.0], dtype=torch.float64)
    linearizer.step()
    amount = 1.25 * 4 / (3 * 100)
    assert linearizer.penalty_weight * 0.5 == pytest.approx(amount)
    expected = [1 - (0.6 - amount * 0.5 / 0.6**0.5), 1 - (1.5 - amount * 0.5 / 1.5**0.5)]
    assert gate.slope.tolist() == pytest.approx(expected)
    assert gate.slope.grad is None


def test_slope_above_one_comes_down() -> None:
    model = network(1)
    with torch.no_grad():
        gates(model)["1"].slope.fill_(1.4)
    linearizer = Linearizer(model, remaining=0, steps=100)
    linearizer.step()
    assert 1 < gates(model)["1"].slope.item() < 1.4


def test_ceiling_takes_the_closest() -> None:
    model = network(10)
    with torch.no_grad():
        gates(model)["1"].slope.copy_(torch.linspace(0.0, 0.9, 10))
    linearizer = Linearizer(model, remaining=2, steps=20, strength=0)
    counts = []
    while not linearizer.done:
        linearizer.step()
        counts.append(linearizer.active)
    assert counts == [10] * 16 + [8, 6, 4, 2]
    assert gates(model)["1"].frozen.tolist() == [False] * 2 + [True] * 8


def test_gradients_from_before_are_forgotten() -> None:
    model = network()
    x, y = data(0)
    ((model(x) - y) ** 2).mean().backward()
    linearizer = Linearizer(model, remaining=0.5, steps=10, strength=0)
    linearizer.step()
    assert all(slope.eq(0).all() for slope in slopes(model).values())


@pytest.mark.parametrize(("survivors", "aim"), [("keep", None), ("common", 0.6), ("relu", 0.0)])
@pytest.mark.parametrize("settle_steps", [0, 1, 7])
def test_survivors(survivors: Any, aim: float | None, settle_steps: int) -> None:
    model = network()
    linearizer = Linearizer(
        model, remaining=5, steps=12, survivors=survivors, common_slope=0.6, settle_steps=settle_steps
    )
    optimizer = adam(linearizer)
    train(model, linearizer, optimizer, range(12))
    start = torch.cat(list(slopes(model).values()))
    alive = ~torch.cat([gate.frozen for gate in gates(model).values()])
    assert alive.sum() == 5
    for call in range(1, settle_steps + 1):
        assert not linearizer.done
        train(model, linearizer, optimizer, range(12 + call, 13 + call))
        goal = start if aim is None else torch.where(alive, aim, 1.0)
        expected = start + (goal - start) * call / settle_steps
        torch.testing.assert_close(torch.cat(list(slopes(model).values())), expected)
    assert linearizer.done
    end = slopes(model)
    if aim is not None:
        assert torch.cat(list(end.values()))[alive].eq(aim).all()
    train(model, linearizer, optimizer, range(30, 33))
    assert all(torch.equal(end[name], slope) for name, slope in slopes(model).items())


def test_weights_are_all_but_slopes() -> None:
    model = network()
    linearizer = Linearizer(model, remaining=3, steps=5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in linearizer.weights()] == [
        name for name, _ in model.named_parameters() if not name.endswith("slope")
    ]


@pytest.mark.parametrize("first", [0, 1])
def test_slope_in_the_users_optimizer_is_noticed(first: int) -> None:
    model = network()
    linearizer = Linearizer(model, remaining=3, steps=5)
    train(model, linearizer, adam(linearizer), range(first))
    with pytest.raises(ConfigurationError, match=r"a slope moved .*optimizer = Adam\(linearizer.weights\(\)\)"):
        train(model, linearizer, torch.optim.Adam(model.parameters()), range(2))


def test_slopes_that_become_nan_are_divergence_and_name_their_gate() -> None:
    model = network()
    linearizer = Linearizer(model, remaining=3, steps=4)
    linearizer.step()
    before = slopes(model)
    gates(model)["3"].slope.grad = torch.full((10,), torch.nan, dtype=torch.float64)
    with pytest.raises(DivergedTraining, match=r"slopes of gate '3' became NaN in call 2 of the ramp") as caught:
        linearizer.step()
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], slope) for name, slope in slopes(model).items())


def test_slopes_that_are_nan_are_refused_by_their_gate() -> None:
    model = network()
    with torch.no_grad():
        gates(model)["1"].slope[4] = torch.nan
    with pytest.raises(ConfigurationError, match=r"found slopes that are NaN in gate '1', expected numbers") as caught:
        Linearizer(model, remaining=3, steps=4)
    assert "\n" not in str(caught.value)
    gates(model)["1"].freeze()  # a frozen slope is 1, whatever was there
    Linearizer(model, remaining=3, steps=4)


@pytest.mark.parametrize("order", ["model first", "linearizer first"])
def test_resumed_training_is_bit_identical(order: str) -> None:
    def make() -> tuple[nn.Module, Linearizer, torch.optim.Optimizer]:
        model = network()
        linearizer = Linearizer(
            model, remaining=4, steps=20, strength=2, survivors="common", settle_steps=6, keep_path=True
        )
        return model, linearizer, adam(linearizer)

    whole = make()
    train(*whole, range(28))
    for cut in (1, 9, 20, 23):
        first = make()
        train(*first, range(cut))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
        second = make()
        for part, state in list(zip(second, states, strict=True))[:: 1 if order == "model first" else -1]:
            part.load_state_dict(state)
        train(*second, range(cut, 28))
        for name, value in whole[0].state_dict().items():
            assert torch.equal(value, second[0].state_dict()[name])
        assert all(torch.equal(rows, second[1].path[name]) for name, rows in whole[1].path.items())


def test_layer_wise_gates_freeze_whole() -> None:
    model = network(8, 4, 2, granularity="layer")
    linearizer = Linearizer(model, remaining=6, steps=20)
    counts = train(model, linearizer, adam(linearizer), range(20))
    assert counts[-1] == 6
    assert nonlinear_units(model).active == {"1": 0, "3": 4, "5": 2}


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.2, 2), (0.3, 4), (0.5, 8), (0.22, 4), (1.0, 14)])
def test_share_of_layer_wise_gates_goes_to_the_nearest_count(share: float, count: int) -> None:
    # Possible: 0 2 4 6 8 10 12 14 of 14; 0.5 asks for 7, a tie, which goes up.
    model = network(8, 4, 2, granularity="layer")
    assert Linearizer(model, remaining=share, steps=3).target == count


def test_impossible_count_names_the_nearest() -> None:
    model = network(8, 4, granularity="layer")
    with pytest.raises(ConfigurationError, match=r"remaining is 6 units, .*nearest possible counts are 4 and 8"):
        Linearizer(model, remaining=6, steps=3)


@pytest.mark.parametrize("seed", range(6))
def test_mixed_granularity_reaches_every_possible_count(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for target in range(0, 16):
        model = nn.Sequential(network(9, 4, granularity="layer"), network(2, seed=seed))
        sizes = (0, 2, 4, 9)
        possible = {a + b + c for a in (0, 9) for b in (0, 4) for c in range(3)}
        with torch.no_grad():
            for gate in gates(model).values():
                gate.slope.copy_(torch.rand(gate.slope.shape, generator=generator, dtype=torch.float64))
        if target not in possible:
            with pytest.raises(ConfigurationError, match="nearest possible"):
                Linearizer(model, remaining=target, steps=4)
            continue
        linearizer = Linearizer(model, remaining=target, steps=4)
        while not linearizer.done:
            linearizer.step()
        assert nonlinear_units(model).active_total == target, sizes


def test_frozen_from_the_start_counts_as_gone() -> None:
    model = network()
    gates(model)["1"].freeze()
    linearizer = Linearizer(model, remaining=0.25, steps=6)
    assert train(model, linearizer, adam(linearizer), range(6))[-1] == 5
    with pytest.raises(ConfigurationError, match="asks for 18 units of 20; only 5 are not frozen yet"):
        Linearizer(model, remaining=0.9, steps=6)


def test_mask_ramp_is_a_straight_line_for_survivors_too() -> None:
    model = network()
    with torch.no_grad():
        for gate in gates(model).values():
            gate.slope.fill_(0.2)
    mask = random_mask(model, 0.25, seed=3)
    ramp = MaskRamp(model, mask, steps=8, survivors="common", common_slope=0.75, settle_steps=4)
    optimizer = adam(ramp)
    for call in range(1, 9):
        train(model, ramp, optimizer, range(call, call + 1))
        for name, slope in slopes(model).items():
            expected = torch.where(mask[name], 0.2 + 0.55 * call / 8, 0.2 + 0.8 * call / 8).double()
            torch.testing.assert_close(slope, expected)
        assert ramp.active == (5 if call == 8 else 20)
    assert not ramp.done
    train(model, ramp, optimizer, range(4))
    assert ramp.done
    for name, slope in slopes(model).items():
        assert torch.equal(slope, torch.where(mask[name], 0.75, 1.0).double())
    assert all(torch.equal(mask[name], found) for name, found in survivor_mask(model).items())


def test_replay_repeats_slopes_and_freezing() -> None:
    model = network()
    linearizer = Linearizer(model, remaining=4, steps=20, strength=2, keep_path=True)
    optimizer = adam(linearizer)
    patterns = []
    for step in range(20):
        train(model, linearizer, optimizer, range(step, step + 1))
        patterns.append(survivor_mask(model))
    path, mask = linearizer.path, survivor_mask(model)
    assert {name: tuple(rows.shape) for name, rows in path.items()} == {"1": (20, 10), "3": (20, 10)}
    other = network(seed=5)
    replay = SlopeReplay(other, path, mask, survivors="relu", settle_steps=3)
    optimizer = adam(replay)
    for step in range(20):
        train(other, replay, optimizer, range(step, step + 1))
        for name, slope in slopes(other).items():
            assert torch.equal(slope, path[name][step])
            assert torch.equal(survivor_mask(other)[name], patterns[step][name])
    train(other, replay, optimizer, range(3))
    assert replay.done
    for name, slope in slopes(other).items():
        assert torch.equal(slope, torch.where(mask[name], 0.0, 1.0).double())


@pytest.mark.parametrize("control", ["ramp", "replay"])
def test_resumed_controls_are_bit_identical(control: str) -> None:
    source = network()
    linearizer = Linearizer(source, remaining=4, steps=10, keep_path=True)
    train(source, linearizer, adam(linearizer), range(10))
    path, mask = linearizer.path, survivor_mask(source)

    def make() -> tuple[nn.Module, Any, torch.optim.Optimizer]:
        model = network(seed=1)
        if control == "ramp":
            owner: Any = MaskRamp(model, mask, steps=10, survivors="common", settle_steps=4)
        else:
            owner = SlopeReplay(model, path, mask, survivors="common", settle_steps=4)
        return model, owner, adam(owner)

    whole = make()
    train(*whole, range(14))
    for cut in (4, 12):
        first, second = make(), make()
        train(*first, range(cut))
        for part, like in zip(second, first, strict=True):
            part.load_state_dict(copy.deepcopy(like.state_dict()))
        train(*second, range(cut, 14))
        assert second[1].done
        for name, value in whole[0].state_dict().items():
            assert torch.equal(value, second[0].state_dict()[name])


def test_random_mask() -> None:
    model = network()
    state = torch.get_rng_state()
    masks = [random_mask(model, 5, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(sum(int(part.sum()) for part in mask.values()) == 5 for mask in masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert not all(torch.equal(masks[0][name], masks[2][name]) for name in masks[0])
    often = sum(torch.cat(list(random_mask(model, 5, seed).values())).double() for seed in range(400))
    assert isinstance(often, Tensor)
    assert ((often - 100).abs() < 45).all()  # five standard deviations of a fair draw
    layers = network(8, 4, 2, granularity="layer")
    assert sum(int(part.sum()) * size for part, size in zip(
        random_mask(layers, 6, 0).values(), (8, 4, 2), strict=True)) == 6  # fmt: skip
    gates(model)["1"].freeze()
    assert not random_mask(model, 5, 0)["1"].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remaining": -1}, r"remaining is -1; expected a share in \[0.0, 1.0\] or a number of units in \[0, 20\]"),
        ({"remaining": 21}, "remaining is 21"),
        ({"remaining": 1.5}, "remaining is 1.5"),
        ({"remaining": True}, "remaining is True"),
        ({"steps": 0}, "steps is 0"),
        ({"settle_steps": -1}, "settle_steps -1"),
        ({"strength": -1.0}, "strength is -1.0; expected"),
        ({"penalty_weight": 0.1}, r"remaining is 5 and penalty_weight 0.1; expected exactly one of them"),
        ({"remaining": None}, r"remaining is None and penalty_weight None; expected exactly one of them"),
        ({"remaining": None, "penalty_weight": -1.0}, "penalty_weight is -1.0; expected"),
        ({"remaining": None, "penalty_weight": float("nan")}, "penalty_weight is nan"),
        ({"remaining": None, "penalty_weight": 0.1, "strength": 2.0}, "strength is 2.0 beside penalty_weight=0.1"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"rule": "soft"}, "rule is 'soft'; expected one of clipped, half-threshold"),
        ({"survivors": "drop"}, "survivors is 'drop'; expected one of keep, common, relu"),
        ({"common_slope": 1.0}, "common_slope is 1.0"),
        ({"common_slope": 2.0}, "common_slope is 2.0"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        Linearizer(network(), **{"remaining": 5, "steps": 10, **settings})
    assert "\n" not in str(caught.value)


def test_wrong_networks_masks_and_paths() -> None:
    with pytest.raises(ConfigurationError, match=r"Linearizer: Linear has no Gate; .*gate_network"):
        Linearizer(nn.Linear(2, 2), remaining=1, steps=2)
    with pytest.raises(ConfigurationError, match="the path was not kept; construct it with keep_path=True"):
        _ = Linearizer(network(), remaining=1, steps=2).path
    with pytest.raises(ConfigurationError, match="the state holds no path"):
        Linearizer(network(), remaining=1, steps=2, keep_path=True).load_state_dict({"calls": 1})
    model = network()
    mask = random_mask(model, 5, 0)
    with pytest.raises(ConfigurationError, match="mask of gate '3' is None; expected"):
        MaskRamp(model, {"1": mask["1"]}, steps=3)
    with pytest.raises(ConfigurationError, match=r"mask of gate '9' is \(2,\); expected None"):
        MaskRamp(model, {**mask, "9": torch.ones(2, dtype=torch.bool)}, steps=3)
    with pytest.raises(ConfigurationError, match=r"expected .* bool"):
        MaskRamp(model, {**mask, "3": torch.ones(10)}, steps=3)
    path = {name: torch.ones(4, 10, dtype=torch.float64) for name in mask}
    with pytest.raises(ConfigurationError, match=r"gates of \[3, 4\] calls"):
        SlopeReplay(model, {**path, "3": path["3"][:3]}, mask)
    with pytest.raises(ConfigurationError, match=r"path of gate '3' holds \(9,\) slopes"):
        SlopeReplay(model, {**path, "3": path["3"][:, :9]}, mask)
    with pytest.raises(ConfigurationError, match="15 slopes that the mask gives up do not end at 1"):
        SlopeReplay(model, {name: rows / 2 for name, rows in path.items()}, mask)
    gates(model)["1"].freeze()
    with pytest.raises(ConfigurationError, match="keeps a unit of gate '1' that is frozen"):
        MaskRamp(model, {name: torch.ones_like(part) for name, part in mask.items()}, steps=3)
