"""How the graph surrogate splits a difference: exact Shapley values inside blocks, and secants as a check.

The cost is a sum over roots, so a coalition of layers matters only to the roots of their blocks: one batch of 2^n rows
per block holds all coalition values. The outer logarithm is split along a straight line of the cost, by one factor.
"""

from functools import cache
from math import factorial

import numpy as np
from numpy.typing import NDArray

from quantdm.surrogates.additive_model import Design, head_of, log_terms
from quantdm.surrogates.amplitudes import AmplitudeNet, Messages, power_energy
from quantdm.surrogates.local import log_rate

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MAX_EXACT = 14  # layers of one block that differ: beyond, 2^n coalitions are too many and secants serve
FEATURES = ("error", "method", "width", "scheme")


def shapley(net: AmplitudeNet, theta: Floats, choice: Ints, reference: Ints) -> Floats:
    """Return every layer's share of y(choice) - y(reference), y = -(a + b · log(c + S)): [L].

    Shapley values of S, exact, times the secant of the logarithm.
    """
    ends, said = _ends(net, theta, choice, reference), net.messages(theta)
    found = np.exp(ends[0]) - np.exp(ends[1])  # layers without a block
    for index, layers in enumerate(net.wiring.blocks):
        here = np.array(layers)
        differ = here[choice[here] != reference[here]]
        found[here] = 0.0
        if len(differ) > MAX_EXACT:
            found[here] = _root_secants(net, index, ends[:, here], said).sum(axis=1)
        elif len(differ):
            found[differ] = _shapley_of_root(net, index, ends, differ, said)
    return found * _outer(net, theta, choice, reference)


def _shapley_of_root(net: AmplitudeNet, index: int, ends: Floats, differ: Ints, said: Messages) -> Floats:
    layers, count = list(net.wiring.blocks[index]), len(differ)
    members = (np.arange(2**count)[:, None] >> np.arange(count)) & 1  # [coalitions, differ]
    rows = np.tile(ends[1], (2**count, 1))
    rows[:, differ] = np.where(members == 1, ends[0][differ], ends[1][differ])
    value = net.root_energy(index, rows[:, layers], said)
    weight = _coalition_weights(count)[members.sum(axis=1)]
    joined = np.arange(2**count)[:, None] | (1 << np.arange(count))
    gain = np.where(members == 0, value[joined] - value[:, None], 0.0)
    return weight @ gain


@cache
def _coalition_weights(count: int) -> Floats:
    """Return |S|! (n - |S| - 1)! / n! for |S| = 0 ... n - 1, and 0 for the whole."""
    found = [factorial(size) * factorial(count - size - 1) / factorial(count) for size in range(count)]
    return np.array([*found, 0.0])


def secants(net: AmplitudeNet, theta: Floats, choice: Ints, reference: Ints) -> Floats:
    """Return the same difference split by secant propagation, over layers and what their terms are made of: [L, 4].

    Two factors of a product take equal parts of its change and every function passes its change on in proportion, as in
    GOAt (Lu et al. 2024) with the reference instead of absence as base. The logarithm of a term is a sum: gamma times
    the logarithm of the one-layer error, and the effects of method, width, and of the scheme alone and on its type.
    """
    ends, said = _ends(net, theta, choice, reference), net.messages(theta)
    per_log = _exp_secant(ends[0], ends[1], 1.0)
    for index, layers in enumerate(net.wiring.blocks):
        here = list(layers)
        per_log[here] = _root_slopes(net, index, ends[:, here], said)
    parts = _log_parts(net.design, theta, choice) - _log_parts(net.design, theta, reference)
    return per_log[:, None] * parts * _outer(net, theta, choice, reference)


def _root_secants(net: AmplitudeNet, index: int, ends: Floats, said: Messages) -> Floats:
    """Return the change of one root's energy, split over its layers: [layers, 1]."""
    return (_root_slopes(net, index, ends, said) * (ends[0] - ends[1]))[:, None]


def _root_slopes(net: AmplitudeNet, index: int, ends: Floats, said: Messages) -> Floats:
    """Return the change of one root's energy per change of every layer's log term, by secants: [layers]."""
    layers, power = list(net.wiring.blocks[index]), float(said.power[index])
    size = len(layers)
    totals = np.exp(power * ends / 2).sum(axis=1)
    energies = power_energy(totals, size, power)
    step = totals[0] - totals[1]
    if abs(step) > 1e-9 * totals.sum():
        per_power = (energies[0] - energies[1]) / step
    else:
        per_power = (2 / power) * energies.mean() / totals.mean()
    found = per_power * _exp_secant(ends[0], ends[1], power / 2)
    amplitude = _exp_secant(ends[0], ends[1], 0.5)
    for row in said.signed[layers].T:
        heard = np.exp(ends / 2) @ row
        found += 2 * heard.mean() / size * row * amplitude
    return found


def _exp_secant(one: Floats, other: Floats, k: float) -> Floats:
    """Return (exp(k one) - exp(k other)) / (one - other), or the slope where they are equal."""
    half = k * (one - other) / 2
    small = np.abs(half) < 1e-6
    ratio = np.where(small, 1.0, np.sinh(half) / np.where(small, 1.0, half))
    return k * np.exp(k * (one + other) / 2) * ratio


def _ends(net: AmplitudeNet, theta: Floats, choice: Ints, reference: Ints) -> Floats:
    """Return the log terms of both configurations: [2, L]."""
    return log_terms(net.design, theta)[np.arange(len(choice)), np.stack([choice, reference])]


def _outer(net: AmplitudeNet, theta: Floats, choice: Ints, reference: Ints) -> float:
    """Return the change of y per change of S between the two configurations."""
    _, b, _, c = head_of(theta)
    alone, roots = net.energies(theta, np.stack([choice, reference]))
    own, other = c + alone.sum(axis=1) + roots.sum(axis=1)
    return log_rate(b, float(own), float(other))


def _log_parts(design: Design, theta: Floats, choice: Ints) -> Floats:
    """Return what every layer's log term is made of, but for what does not depend on its option: [L, FEATURES]."""
    start = 4 + design.layer.shape[1]
    stop = start + design.option.shape[1]
    effects, option = theta[start:stop], design.option
    pair = design.kind @ theta[stop : stop + design.kind.shape[1] * len(option)].reshape(design.kind.shape[1], -1)
    rows = np.arange(len(choice))
    by_part = {name: option[:, where] @ effects[where] for name, where in design.parts.items()}
    return np.stack(
        [
            head_of(theta)[2] * design.log_error[rows, choice],
            by_part["method"][choice],
            by_part["width"][choice],
            by_part["option"][choice] + pair[rows, choice],
        ],
        axis=1,
    )
