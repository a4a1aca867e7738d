"""Weights and activations chosen together: optimal within bit operations, within stored bits too, and as a recipe."""

import itertools
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from quantdm.allocation.pairs import select_pairs
from quantdm.cli.main import app
from quantdm.denoisers.inventory import list_layers
from quantdm.denoisers.macs import layer_macs
from quantdm.errors import QuantDMError
from quantdm.recipe import bit_operations, load_recipe
from quantdm.runs.operations import INPUTS_FILE, select_within
from quantdm.runs.run import Run

WEIGHT_BITS, INPUT_BITS = np.array([2, 3, 4]), np.array([4, 8])


def instance(seed: int, layers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Make values of weights and inputs, operations and sizes: errors fall fourfold a bit, scattered by layer."""
    rng = np.random.default_rng(seed)
    values = -(4.0**-WEIGHT_BITS) * np.exp(rng.normal(size=(layers, 3)))
    inputs = -(4.0**-INPUT_BITS) * 8 * np.exp(rng.normal(size=(layers, 2)))
    macs, weights = rng.integers(1, 50, size=layers), rng.integers(1, 50, size=layers)
    operations = macs[:, None, None] * WEIGHT_BITS[:, None] * INPUT_BITS
    return values, inputs, operations, weights[:, None] * WEIGHT_BITS


@pytest.mark.parametrize("seed", range(12))
def test_pairs_are_optimal_within_the_operations_and_keep_to_the_size(seed: int) -> None:
    values, inputs, operations, sizes = instance(seed, 4)
    rows = np.arange(4)
    pairs = list(itertools.product(range(3), range(2)))
    every = [np.array(pick).T for pick in itertools.product(pairs, repeat=4)]
    worth = np.array([values[rows, w].sum() + inputs[rows, a].sum() for w, a in every])
    cost = np.array([operations[rows, w, a].sum() for w, a in every])
    size = np.array([sizes[rows, w].sum() for w, a in every])
    budget = int(np.quantile(cost, 0.3))
    weights, picked = select_pairs(values, inputs, operations, budget)
    assert operations[rows, weights, picked].sum() <= budget
    assert values[rows, weights].sum() + inputs[rows, picked].sum() == pytest.approx(worth[cost <= budget].max())
    most = int(np.quantile(size[cost <= budget], 0.5))
    weights, picked = select_pairs(values, inputs, operations, budget, sizes=sizes, max_bits=most)
    assert operations[rows, weights, picked].sum() <= budget
    assert sizes[rows, weights].sum() <= most
    found = values[rows, weights].sum() + inputs[rows, picked].sum()
    fits = worth[(cost <= budget) & (size <= most)]
    assert np.median(fits) <= found <= fits.max() + 1e-12  # a price may leave a gap, large with four layers


def test_budgets_out_of_reach_state_the_range(tmp_path) -> None:
    values, inputs, operations, sizes = instance(0, 4)
    with pytest.raises(QuantDMError, match=r"target_bops: got 3, but these options reach"):
        select_pairs(values, inputs, operations, 3)
    with pytest.raises(QuantDMError, match="no choice of these options has 3 bits and"):
        select_pairs(values, inputs, operations, int(operations.max(axis=(1, 2)).sum()), sizes=sizes, max_bits=3)
    (tmp_path / "run.json").write_text('{"version": 2}')
    result = CliRunner().invoke(app, ["select", "--run-dir", str(tmp_path), "-o", "x.yaml"])
    assert isinstance(result.exception, QuantDMError)
    assert "--target-bops or both" in str(result.exception)


def test_a_run_gives_a_recipe_within_operations_and_bits_that_says_it_was_not_measured(finished, dit, tmp_path) -> None:
    run = Run.open(shutil.copytree(finished[0], tmp_path / "run"))
    macs = layer_macs(dit.transformer)
    target = 3.0 * 6 * sum(macs.values())
    recipe = select_within(run, target_bops=target, target_bits=3.2, inputs=("token-4", "token-8"))
    kept = run.path(INPUTS_FILE).read_text()
    recipe = load_recipe(recipe.save(tmp_path / "recipe.yaml"))
    layers = list_layers(dit.transformer)
    assert recipe.activations is not None
    inputs = recipe.activations.resolve(layers)
    assert 0.9 * target < bit_operations(macs, recipe.resolve(layers), inputs) <= target
    assert recipe.avg_bits is not None
    assert recipe.avg_bits <= 3.2
    assert {scheme.bits for scheme in inputs.values() if scheme} == {4, 8}
    assert "not measured" in recipe.provenance.source
    cheaper = select_within(run, target_bops=0.8 * target, inputs=("token-4", "token-8"))
    assert run.path(INPUTS_FILE).read_text() == kept  # measured once
    assert bit_operations(macs, cheaper.resolve(layers), cheaper.activations.resolve(layers)) <= 0.8 * target  # type: ignore[union-attr]
