"""What the study of measured explanations asks, and how it judges the answers: swaps, restore curves, blocks.

A plan is which configurations are measured ("rows" [N, L]); a judge gets their y [2, N] on two draws of noises and what
every image adds to it [2, N, images]. `restore_study.py` measures.
"""

import math
from typing import Any

import numpy as np

from quantdm.allocation import select
from quantdm.metrics.intervals import paired_interval
from quantdm.surrogates import SearchSpace, explain_one
from quantdm.surrogates.ranking import spearman

SHARES, RANDOM, BOOTSTRAP, TARGET, BLOCKS = (0.05, 0.1, 0.2, 0.4, 0.7), 5, 2000, 3.0, 20


# ------------------------------------------------------------------------------------------------------------- swaps


def plan_swaps(space: SearchSpace, _: dict[str, Any], count: int) -> dict[str, Any]:
    """Swap one layer a time in the choice of the one-layer sensitivities, as often in every operation type."""
    reference = select(space, -space.noise_error, target_bits=TARGET)
    return {"rows": np.concatenate([reference[None], draw_swaps(space, reference, count)])}


def draw_swaps(space: SearchSpace, reference: np.ndarray, count: int) -> np.ndarray:
    """Return distinct configurations [N, L] in which one layer takes another option, in turn from every type."""
    rng, types = np.random.default_rng(0), np.array([layer.op_type for layer in space.layers])
    options = np.arange(len(space.options))
    left = {
        name: rng.permutation(np.argwhere((types == name)[:, None] & (options != reference[:, None]))).tolist()
        for name in dict.fromkeys(types.tolist())
    }
    taken: list[list[int]] = []
    while len(taken) < count and any(left.values()):
        taken += [queue.pop() for queue in left.values() if queue]
    layer, option = np.array(taken[:count]).T
    rows = np.tile(reference, (len(layer), 1))
    rows[np.arange(len(layer)), layer] = option
    return rows


def judge_swaps(
    space: SearchSpace, fitted: dict[str, Any], plan: dict[str, Any], y: np.ndarray, _: np.ndarray
) -> dict[str, Any]:
    """Compare predicted with measured differences of swapped configurations."""
    reference, rows, delta = plan["rows"][0], plan["rows"][1:], y[:, 1:] - y[:, :1]
    told = {
        name: surrogate.predict(rows) - surrogate.predict(reference[None])  # one layer differs: all is its share
        for name, surrogate in fitted.items()
    }
    for name, table in (("noise errors", space.noise_error), ("weight errors", space.weight_error)):
        told[name] = (space.gather(table, reference) - space.gather(table, rows)).sum(axis=1)
    mean, repeat = delta.mean(axis=0), spearman(delta[0], delta[1])
    ceiling = math.sqrt(2 * repeat / (1 + repeat)) if repeat > 0 else None  # of a mean of two: Spearman-Brown
    label_sd = float(np.std(delta[0] - delta[1]) / np.sqrt(2))
    large = np.abs(mean) > 2 * label_sd
    resamples = np.random.default_rng(0).integers(0, len(mean), (BOOTSTRAP, len(mean)))
    rhos = {name: [spearman(v[index], mean[index]) for index in resamples] for name, v in told.items()}
    found = {}
    for name, values in told.items():
        rho, ahead = spearman(values, mean), np.subtract(rhos[name], rhos["noise errors"])
        found[name] = {
            "spearman": round(rho, 4),
            "interval": bounds(rhos[name]),
            "ahead_of_noise_errors": bounds(ahead),
            "over_ceiling": None if ceiling is None else round(rho / ceiling, 4),
            "over_root_r": round(rho / math.sqrt(repeat), 4) if repeat > 0 else None,
            "large": round(spearman(values[large], mean[large]), 4) if large.sum() > 2 else None,
            "small": round(spearman(values[~large], mean[~large]), 4) if (~large).sum() > 2 else None,
        }
    return {
        "swaps": len(mean),
        "large": int(large.sum()),
        "label_sd": round(label_sd, 5),
        "median_size": round(float(np.median(np.abs(mean))), 5),
        "agreement_of_draws": round(repeat, 4),
        "agreement_of_draws_large": round(spearman(delta[0][large], delta[1][large]), 4) if large.sum() > 2 else None,
        "agreement": found,
    }


def bounds(values: Any) -> list[float]:
    """Return the 95 % bootstrap interval."""
    return [round(float(q), 4) for q in np.quantile(values, [0.025, 0.975])]


# ------------------------------------------------------------------------------------------------------------ curves


def plan_curves(space: SearchSpace, fitted: dict[str, Any], _: int) -> dict[str, Any]:
    """Order the layers by every ranking, and restore them until shares of the bytes are spent."""
    low, high = ends_of(space)
    x, reference = (np.full(len(space.layers), option) for option in (low, high))
    extra = (space.bits[:, high] - space.bits[:, low]).astype(float)
    gains = {name: -explain_one(surrogate, x, reference).contributions for name, surrogate in fitted.items()}
    gains |= {
        name: table[:, low] - table[:, high]
        for name, table in (("noise errors", space.noise_error), ("weight errors", space.weight_error))
    }
    rng = np.random.default_rng(0)
    orders = {name: np.argsort(-gain / extra) for name, gain in gains.items()}
    orders |= {"bits": np.argsort(extra, kind="stable")}
    orders |= {f"random {i}": rng.permutation(len(extra)) for i in range(RANDOM)}
    rows = [restored(x, reference, order, extra, share) for order in orders.values() for share in SHARES]
    return {"rows": np.stack([x, reference, *rows]), "orders": list(orders), "ends": (low, high)}


def judge_curves(
    space: SearchSpace, fitted: dict[str, Any], plan: dict[str, Any], y: np.ndarray, influence: np.ndarray
) -> dict[str, Any]:
    """Return how much of the loss every order undoes, and how far the surrogates' areas are ahead of the others'."""
    names, whole = plan["orders"], y[:, 1] - y[:, 0]
    shape = (2, len(names), len(SHARES))
    undone = (y[:, 2:] - y[:, :1]).reshape(shape) / whole[:, None, None]
    area = undone.mean(axis=2)  # [draws, orders]
    moved = influence[:, 2:].reshape(*shape, -1).mean(axis=2)  # of y, over the shares: [draws, orders, images]
    ends = influence[:, 1] - influence[:, 0]
    chance = [names.index(f"random {i}") for i in range(RANDOM)]
    rivals = {name: [names.index(name)] for name in ("noise errors", "weight errors", "bits")} | {"chance": chance}

    def ahead(own: int, others: list[int]) -> dict[str, Any]:
        gap = area[:, own] - area[:, others].mean(axis=1)
        by_image = moved[:, own] - moved[:, others].mean(axis=1) - gap[:, None] * ends  # of a ratio, to first order
        found = paired_interval(gap.tolist(), (by_image / whole[:, None]).tolist())
        return {"by": round(found.estimate, 4), "interval": [round(found.low, 4), round(found.high, 4)]}

    return {
        "from": space.labels[plan["ends"][0]],
        "to": space.labels[plan["ends"][1]],
        "shares_of_bytes": list(SHARES),
        "fid_fp_of_ends": np.round(np.exp(-y[:, :2].mean(axis=0)), 5).tolist(),
        "undone": {name: np.round(undone[:, i].mean(axis=0), 4).tolist() for i, name in enumerate(names)},
        "area_per_draw": {name: np.round(area[:, i], 4).tolist() for i, name in enumerate(names)},
        "area_ahead_of": {
            name: {rival: ahead(names.index(name), others) for rival, others in rivals.items() if rival != name}
            for name in (*fitted, "noise errors")
        },
        "best_random_area": round(float(area[:, chance].mean(axis=0).max()), 4),
    }


def ends_of(space: SearchSpace, step: int = 2) -> tuple[int, int]:
    """Return the option of fewest bits, and the one of its method that is some bits wider."""
    low = int(space.bits.sum(axis=0).argmin())
    own = space.options[low]
    for index, option in enumerate(space.options):
        if option.bits == own.bits + step and option.label == own.label.replace(f"-{own.bits}", f"-{option.bits}"):
            return low, index
    return low, int(space.bits.sum(axis=0).argmax())


def restored(x: np.ndarray, reference: np.ndarray, order: np.ndarray, extra: np.ndarray, share: float) -> np.ndarray:
    """Return x with layers restored in order as long as they fit into a share of all extra bits."""
    found, left = x.copy(), share * extra.sum()
    for layer in order:
        if extra[layer] <= left:
            found[layer], left = reference[layer], left - extra[layer]
    return found


# ------------------------------------------------------------------------------------------------------------ blocks


def plan_blocks(space: SearchSpace, _: dict[str, Any], __: int) -> dict[str, Any]:
    """Take a bit from every layer of a block alone, and from all of them."""
    low, wider = ends_of(space, step=1)
    reference = np.full(len(space.layers), wider)
    members = [sorted(space.layer_index[name] for name in block.layers) for block in space.graph.blocks]
    members = [block for block in members if len(block) > 1][:BLOCKS]
    rows, parts = [reference], []
    for block in members:
        parts.append((len(rows), [len(rows) + 1 + i for i in range(len(block))]))
        for layers in (block, *([layer] for layer in block)):
            row = reference.copy()
            row[layers] = low
            rows.append(row)
    return {"rows": np.stack(rows), "parts": parts, "ends": (wider, low)}


def judge_blocks(
    space: SearchSpace, fitted: dict[str, Any], plan: dict[str, Any], y: np.ndarray, _: np.ndarray
) -> dict[str, Any]:
    """Compare what blocks lose beyond their layers, predicted and measured."""

    def effects(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the change by whole blocks and the interactions [..., B] from y [..., N]."""
        delta = values - values[..., :1]
        together = np.stack([delta[..., whole] for whole, _ in plan["parts"]], axis=-1)
        return together, together - np.stack([delta[..., alone].sum(-1) for _, alone in plan["parts"]], axis=-1)

    together, interaction = effects(y)
    repeat = spearman(interaction[0], interaction[1])
    found = {}
    for name, surrogate in fitted.items():
        told = effects(surrogate.predict(plan["rows"]))
        found[name] = {
            "blocks_spearman": round(spearman(told[0], together.mean(axis=0)), 4),
            "interactions_spearman": round(spearman(told[1], interaction.mean(axis=0)), 4),
            "share_of_interaction": round(float(np.abs(told[1]).sum() / np.abs(told[0]).sum()), 4),
        }
    mean = together.mean(axis=0), interaction.mean(axis=0)
    return {
        "blocks": len(plan["parts"]),
        "from": space.labels[plan["ends"][0]],
        "to": space.labels[plan["ends"][1]],
        "interaction_sd": round(float(np.std(interaction[0] - interaction[1]) / np.sqrt(2)), 5),
        "agreement_of_draws": round(repeat, 4),
        "share_of_interaction_measured": round(float(np.abs(mean[1]).sum() / np.abs(mean[0]).sum()), 4),
        "mean_block": round(float(mean[0].mean()), 5),
        "mean_interaction": round(float(mean[1].mean()), 5),
        "surrogates": found,
    }
