"""A run's findings against published ones: every one is shown where the architecture has it, and can be told apart."""

import numpy as np
import pytest

from quantdm.report.published import compare_published, say_published
from quantdm.surrogates.roles import role_of
from tests.planted import planted_space


def values_of(space, heavy):
    """Values that fall fourfold per bit, `heavy` times as much for some roles."""
    roles = np.array([role_of(layer) for layer in space.layers])
    scale = np.array([heavy.get(role, 1.0) for role in roles.tolist()])
    return -scale[:, None] * np.array([4.0**-option.bits for option in space.options])


def test_every_finding_agrees_where_it_is_planted_and_disagrees_where_its_opposite_is():
    space = planted_space(model="pixart-xl-2")
    as_published = {"final": 9.0, "time-MLP": 5.0, "self q": 0.2, "cross q": 0.2, "text-MLP": 0.5}
    found = compare_published(space, values_of(space, as_published))
    assert [item.agrees for item in found if "k-means" not in item.published] == [True] * 3
    turned = compare_published(space, values_of(space, {role: 1 / factor for role, factor in as_published.items()}))
    assert [item.agrees for item in turned if "k-means" not in item.published] == [False] * 3
    text = say_published(space, values_of(space, as_published))
    assert text is not None
    assert "query" not in text


def test_methods_are_held_against_what_is_said_of_the_kind_of_network():
    for model, published in (("pixart-xl-2", "k-means"), ("sd-1.5", "uniform")):
        space = planted_space(model=model)
        uniform = np.array([option.method == "uniform" for option in space.options])
        for better in (True, False):
            values = values_of(space, {}) + 0.1 * (uniform == better)
            (item,) = [c for c in compare_published(space, values) if published in c.published]
            assert item.agrees == (better == (published == "uniform"))


@pytest.mark.parametrize("model", ["pixart-xl-2", "sd-1.5", "sd-3.5-medium"])
def test_every_layer_of_a_public_architecture_has_a_role(model):
    role = {layer.name: role_of(layer) for layer in planted_space(model=model).layers}
    assert [name for name, found in role.items() if found in ("linear", "conv")] == []
    assert {"q", "k", "v", "out", "in", "final"} <= {found.split(" ")[-1] for found in role.values()}
