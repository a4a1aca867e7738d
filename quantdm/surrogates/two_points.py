"""Interventional TreeSHAP between two points: exact Shapley values of the features of boosted trees.

Lundberg et al. 2020: the value of a coalition is the tree at a point that takes the coalition's features from x and the
others from the reference. A leaf is reached by the coalitions that hold all features of a set `own` (where x went its
way alone) and none of a set `other` (where the reference did): Shapley values in closed form.
"""

import json
from dataclasses import dataclass
from math import factorial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tree:
    """One tree: children of every node (-1: a leaf), the feature it asks for, and the limit, or the leaf's value."""

    left: list[int]
    right: list[int]
    feature: list[int]
    limit: list[float]


def trees_of(booster: Any) -> list[Tree]:
    """Read the trees of an XGBoost booster from its JSON model."""
    model = json.loads(booster.save_raw("json").decode())
    return [
        Tree(tree["left_children"], tree["right_children"], tree["split_indices"], tree["split_conditions"])
        for tree in model["learner"]["gradient_booster"]["model"]["trees"]
    ]


def shapley_of_trees(trees: list[Tree], x: Floats, reference: Floats) -> Floats:
    """Return every feature's share of f(x) - f(reference), f the sum of the trees: [F], [F] -> [F]."""
    found = np.zeros(len(x))
    own, other = x.astype(np.float32), reference.astype(np.float32)  # as XGBoost compares
    for tree in trees:
        _descend(tree, 0, own, other, frozenset(), frozenset(), found)
    return found


def _descend(
    tree: Tree,
    node: int,
    x: NDArray[np.float32],
    reference: NDArray[np.float32],
    own: frozenset[int],
    other: frozenset[int],
    found: Floats,
) -> None:
    """Add what the leaves below a node give to the features in which the way of x differs from the reference's."""
    if tree.left[node] < 0:
        _credit(tree.limit[node], own, other, found)
        return
    feature, limit = tree.feature[node], np.float32(tree.limit[node])
    own_way, other_way = (tree.left[node] if point[feature] < limit else tree.right[node] for point in (x, reference))
    if own_way == other_way:
        _descend(tree, own_way, x, reference, own, other, found)
        return
    if feature not in other:
        _descend(tree, own_way, x, reference, own | {feature}, other, found)
    if feature not in own:
        _descend(tree, other_way, x, reference, own, other | {feature}, found)


def _credit(value: float, own: frozenset[int], other: frozenset[int], found: Floats) -> None:
    a, b = len(own), len(other)
    if a + b == 0:
        return  # reached either way
    if a:
        found[list(own)] += value * factorial(a - 1) * factorial(b) / factorial(a + b)
    if b:
        found[list(other)] -= value * factorial(a) * factorial(b - 1) / factorial(a + b)
