"""Selection: the knapsack is optimal, the budget is never exceeded, what cannot be had is explained."""

import itertools
import time

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from quantdm.allocation.knapsack import hull_steps, solve_knapsack
from quantdm.allocation.select import pareto, select, select_lambda
from quantdm.allocation.units import budget_of, build_units
from quantdm.errors import QuantDMError
from quantdm.schemes import PAPER_OPTIONS
from quantdm.surrogates import BlockScores
from tests.planted import PlantedTruth, planted_space


@pytest.fixture(scope="module")
def space():
    return planted_space()


@pytest.fixture(scope="module")
def values(space):
    return -PlantedTruth(space).terms


def sdxl_sized(rng, *, scatter):
    """803 layers x 9 options: errors fall fourfold per bit; `scatter` 0 makes values proportional to bits."""
    weights = np.exp(rng.normal(14, 1.5, size=(803, 1))).astype(np.int64)
    widths = np.array([2, 3, 4] * 3)
    bits = weights * widths + rng.integers(0, 1000, size=(803, 1)) * np.array([1, 1, 1, 2, 4, 8, 0, 0, 0]) * 16
    if scatter == 0:
        return bits / bits.sum() * (1 + 1e-3 * rng.normal(size=bits.shape)), bits
    error = 4.0**-widths * np.repeat([1, 0.45, 1.3], 3)
    return -error * np.exp(rng.normal(size=(803, 1)) + scatter * rng.normal(size=bits.shape)), bits


@pytest.mark.parametrize("ties", [False, True], ids=["random values", "many equal values"])
def test_knapsack_equals_brute_force_on_small_instances(ties):
    rng = np.random.default_rng(int(ties))
    for _ in range(100):
        L, options = rng.integers(1, 6), rng.integers(1, 5)
        value = rng.integers(0, 4, size=(L, options)) * 1.0 if ties else rng.normal(size=(L, options))
        bits = rng.integers(1, 30, size=(L, options))
        budget = int(rng.integers(bits.min(axis=1).sum(), bits.max(axis=1).sum() + 2))
        rows = np.arange(L)
        everything = [np.array(pick) for pick in itertools.product(range(options), repeat=L)]
        best = max(value[rows, pick].sum() for pick in everything if bits[rows, pick].sum() <= budget)
        found = solve_knapsack(list(value), list(bits), budget)
        assert bits[rows, found].sum() <= budget
        assert value[rows, found].sum() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("target", [2.4, 3.0, 3.7])
def test_knapsack_equals_the_integer_program_on_a_real_space(space, values, target):
    L, options = values.shape
    budget = budget_of(space, target)
    one_each = LinearConstraint(np.kron(np.eye(L), np.ones(options)), 1, 1)
    spend = LinearConstraint(space.bits.ravel()[None] / budget, -np.inf, 1)
    answer = milp(
        -values.ravel() / np.abs(values).max(),
        integrality=np.ones(values.size),
        bounds=Bounds(0, 1),
        constraints=[one_each, spend],
        options={"mip_rel_gap": 1e-9},
    )
    choice = select(space, values, target_bits=target)
    ours = space.gather(values, choice).sum() / np.abs(values).max()
    assert ours >= -answer.fun - 1e-6  # the solver may overshoot its budget by its tolerance


@pytest.mark.parametrize("scatter", [0.4, 0], ids=["scattered values", "values proportional to bits"])
def test_803_layers_take_seconds_and_leave_nothing_on_the_table(scatter):
    value, bits = sdxl_sized(np.random.default_rng(0), scatter=scatter)
    budget = int(bits.min(axis=1).sum() * 1.4)
    start = time.process_time()
    found = solve_knapsack(list(value), list(bits), budget)
    assert time.process_time() - start < 5
    rows = np.arange(len(bits))
    assert bits[rows, found].sum() <= budget
    # no solution beats the Lagrangian bound at the price where the hull stops fitting
    spent, price = int(bits.min(axis=1).sum()), 0.0
    for step in hull_steps(list(value), list(bits))[1]:
        spent += step.extra
        if spent > budget:
            price = step.rate
            break
    bound = (value - price * bits).max(axis=1).sum() + price * budget
    reach = value.max(axis=1).sum() - value.min(axis=1).sum()
    assert bound - value[rows, found].sum() <= 1e-6 * reach


def test_a_target_that_a_choice_has_is_allowed_to_that_choice(space, values):
    for choice in pareto(space, values, num=12):
        target = float(space.avg_bits(choice)[0])
        found = select(space, values, target_bits=target)
        assert space.avg_bits(found)[0] <= target
        assert space.gather(values, found).sum() == pytest.approx(space.gather(values, choice).sum(), abs=1e-12)


def test_pareto_choices_rise_in_bits_and_value(space, values):
    front = pareto(space, values, num=30)
    bits = np.array([space.total_bits(choice)[0] for choice in front])
    total = np.array([space.gather(values, choice).sum() for choice in front])
    assert 20 <= len(front) <= 30
    assert (np.diff(bits) > 0).all()
    assert (np.diff(total) > 0).all()
    assert bits[0] == space.bits.min(axis=1).sum()
    assert total[-1] == pytest.approx(values.max(axis=1).sum())


def test_max_bits_and_target_bits_mean_the_same(space, values):
    one = select(space, values, target_bits=3.0)
    other = select(space, values, max_bits=3 * int(space.num_weights.sum()))
    assert (one == other).all()


def test_pins_and_ties_hold_and_cost_value(space, values):
    first, second = space.layer_names[3], space.layer_names[20]
    free = select(space, values, target_bits=3.0)
    pinned = select(space, values, target_bits=3.0, pins={first: "uniform-channel-4"})
    assert space.config(pinned)[first].label == "uniform-channel-4"
    assert space.gather(values, pinned).sum() <= space.gather(values, free).sum() + 1e-12
    names = [name for name in space.layer_names if name.endswith(("to_q", "to_k"))]
    tied = select(space, values, target_bits=3.0, ties=[names, [names[0], second]])
    assert len({tied[space.layer_index[name]] for name in [*names, second]}) == 1
    assert space.avg_bits(tied)[0] <= 3.0


@pytest.mark.parametrize("forbidden", [{"uniform-channel-2", "kmeans-tensor-2"}, {"proj_out_1": ["kmeans-channel-4"]}])
def test_forbidden_schemes_are_not_taken_and_cost_value(space, values, forbidden):
    free = select(space, values, target_bits=3.0)
    barred = select(space, values, target_bits=3.0, forbidden=forbidden)
    rows = forbidden if isinstance(forbidden, dict) else dict.fromkeys(space.layer_names, forbidden)
    priced, _ = select_lambda(space, values, price=0.0, forbidden=forbidden)
    for choice in (barred, priced, *pareto(space, values, num=6, forbidden=forbidden)):
        chosen = space.config(choice)
        assert all(chosen[name].label not in labels for name, labels in rows.items())
    assert space.gather(values, barred).sum() <= space.gather(values, free).sum() + 1e-12


def test_what_pins_ties_and_forbidden_schemes_hold_is_named(space, values):
    wide = [label for label in space.labels if not label.endswith("4")]
    with pytest.raises(QuantDMError, match="without pins, ties and forbidden schemes from"):
        select(space, values, target_bits=3.0, forbidden=wide)


# ------------------------------------------------------------------------------------------------------- λ and blocks


@pytest.mark.parametrize("target", [2.2, 2.7, 3.0, 3.5, 4.4])
def test_lambda_is_the_lowest_that_meets_the_size(space, values, target):
    choice, price = select_lambda(space, values, target_bits=target)
    assert space.avg_bits(choice)[0] <= target
    again, _ = select_lambda(space, values, price=price)
    assert (again == choice).all()
    if price > 0:
        cheaper, _ = select_lambda(space, values, price=price * (1 - 1e-6))
        assert space.avg_bits(cheaper)[0] > target
    # the knapsack has the same budget and no need of one price for all
    best = space.gather(values, select(space, values, target_bits=target)).sum()
    assert space.gather(values, choice).sum() <= best + 1e-12
    priced = values - price * space.bits / space.num_weights.sum()
    taken = space.gather(priced, choice)[0]
    assert taken == pytest.approx(priced.max(axis=1), abs=1e-9 * np.abs(priced).max())


def test_a_higher_price_buys_fewer_bits(space, values):
    sizes = [space.total_bits(select_lambda(space, values, price=price)[0])[0] for price in (0, 0.1, 1, 10, 1e9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == space.bits.min(axis=1).sum()
    free, _ = select_lambda(space, values, price=0)
    assert space.gather(values, free).sum() == pytest.approx(values.max(axis=1).sum())


def block_scores(space, seed=0, width=3):
    """Random scores of all assignments of the blocks of two or three layers."""
    rng, found = np.random.default_rng(seed), []
    for block in space.graph.blocks:
        if 2 <= len(block.layers) <= width:
            layers = tuple(space.layer_index[name] for name in block.layers)
            rows = np.array(list(np.ndindex(*[len(space.options)] * len(layers))))
            found.append(BlockScores(block.name, layers, rows, rng.normal(size=(2, len(rows)))))
    return found


def total(space, values, blocks, choice):
    """The value of a choice, by the definition."""
    found = space.gather(values, choice).sum()
    for block in blocks:
        row = int(np.flatnonzero((block.assignments == choice[list(block.layers)]).all(axis=1))[0])
        found += block.scores.mean(axis=0)[row]
    return found


def test_whole_blocks_are_chosen_to_the_optimum(space, values):
    blocks = block_scores(space)
    budget = budget_of(space, 3.0)
    units = build_units(space, values, blocks=blocks)
    assert sorted(int(layer) for unit in units for layer in unit.layers) == list(range(len(space.layers)))
    choice = select(space, values, blocks=blocks, target_bits=3.0)
    assert space.total_bits(choice)[0] <= budget
    worth = sum(unit.values[_row(unit, choice)] for unit in units)
    assert worth == pytest.approx(total(space, values, blocks, choice))
    # the Lagrangian bound: nothing within the budget is worth more
    _, price = select_lambda(space, values, blocks=blocks, target_bits=3.0)
    rate = price / space.num_weights.sum()
    bound = sum((unit.values - rate * unit.bits).max() for unit in units) + rate * budget
    reach = sum(np.ptp(unit.values) for unit in units)
    assert 0 <= bound - worth <= 1e-3 * reach
    single = select(space, values, target_bits=3.0)
    assert total(space, values, blocks, single) <= worth + 1e-9


def _row(unit, choice):
    return int(np.flatnonzero((unit.assignments == choice[unit.layers]).all(axis=1))[0])


def test_additive_block_scores_choose_as_single_layers_do(space, values):
    blocks = [
        BlockScores(b.name, b.layers, b.assignments, values[list(b.layers), b.assignments].sum(axis=1)[None])
        for b in block_scores(space)
    ]
    rest = values.copy()
    rest[[layer for block in blocks for layer in block.layers]] = 0
    one = select(space, rest, blocks=blocks, target_bits=3.0)
    other = select(space, values, target_bits=3.0)
    assert space.gather(values, one).sum() == pytest.approx(space.gather(values, other).sum(), abs=1e-9)


def test_pins_ties_and_forbidden_schemes_hold_inside_blocks(space, values):
    blocks = block_scores(space)
    first, second = (space.layer_names[layer] for layer in blocks[0].layers[:2])
    choice = select(
        space, values, blocks=blocks, target_bits=3.2, pins={first: "uniform-channel-4"}, ties=[[first, second]],
        forbidden={"kmeans-tensor-2"},
    )  # fmt: skip
    config = space.config(choice)
    assert config[first].label == config[second].label == "uniform-channel-4"
    assert "kmeans-tensor-2" not in {scheme.label for scheme in config.values() if scheme is not None}
    other = space.layer_names[blocks[1].layers[0]]
    with pytest.raises(QuantDMError, match="tie layers within a block"):
        select(space, values, blocks=blocks, target_bits=3.2, ties=[[first, other]])


def test_infeasible_budgets_state_the_range(space, values):
    low = int(space.bits.min(axis=1).sum())
    assert space.total_bits(select(space, values, max_bits=low))[0] == low
    with pytest.raises(QuantDMError, match=f"{low / space.num_weights.sum():.4f} to .* can be reached"):
        select(space, values, max_bits=low - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"target_bits": 3.0, "max_bits": 10}, "exactly one"),
        ({"target_bits": float("nan")}, "positive number"),
        ({"target_bits": 3.0, "pins": {"nowhere": "uniform-channel-4"}}, "not in this model"),
        ({"target_bits": 3.0, "pins": {"proj_out_1": "uniform-channel-7"}}, "is no option"),
        (
            {
                "target_bits": 3.0,
                "pins": {"proj_out_1": "uniform-channel-4", "proj_out_2": "uniform-channel-3"},
                "ties": [["proj_out_1", "proj_out_2"]],
            },
            "tied layers are pinned",
        ),
        ({"target_bits": 3.0, "forbidden": "uniform-channel-4"}, "expected a set of scheme labels"),
        ({"target_bits": 3.0, "forbidden": ["uniform-channel-9"]}, "forbidden: 'uniform-channel-9' is no option"),
        ({"target_bits": 3.0, "forbidden": {"nowhere": ["uniform-channel-4"]}}, "not in this model"),
        ({"target_bits": 3.0, "forbidden": [o.label for o in PAPER_OPTIONS]}, "nothing is left for layer"),
        (
            {
                "target_bits": 3.0,
                "pins": {"proj_out_1": "uniform-channel-4"},
                "forbidden": {"proj_out_1": ["uniform-channel-4"]},
            },
            "is forbidden there",
        ),
    ],
    ids=[
        "no budget",
        "two budgets",
        "nan budget",
        "unknown layer",
        "unknown option",
        "pins against ties",
        "forbidden string",
        "unknown forbidden option",
        "unknown forbidden layer",
        "all forbidden",
        "pin forbidden",
    ],
)
def test_bad_requests_are_one_clear_error(space, values, arguments, message):
    with pytest.raises(QuantDMError, match=message):
        select(space, values, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "exactly one"), ({"price": 1.0, "target_bits": 3.0}, "not both"), ({"price": -1.0}, "0 or more"),
     ({"price": float("nan")}, "0 or more"), ({"target_bits": 1.0}, "can be reached")],
)  # fmt: skip
def test_bad_prices_are_one_clear_error(space, values, arguments, message):
    with pytest.raises(QuantDMError, match=message):
        select_lambda(space, values, **arguments)


def test_bad_values_are_one_clear_error(space, values):
    with pytest.raises(QuantDMError, match="expected \\[layers, options\\]"):
        select(space, values[:-1], target_bits=3.0)
    with pytest.raises(QuantDMError, match=r"1 of .* are NaN"):
        select(space, np.where(np.arange(values.size).reshape(values.shape) == 5, np.nan, values), target_bits=3.0)
