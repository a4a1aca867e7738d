"""Do explanations say what really happens? Restore layers and swap layers, and measure.

    python eval/restore_study.py RUN_DIR [--swaps 200] [--workers 1] [--only swaps|curves]

Swaps: in the 3.0-bit choice of the one-layer sensitivities (which no surrogate chose) one layer takes another option;
predicted differences are held against measured ones on two draws of noises. The agreement r of the draws bounds what
can be reached: rho / sqrt(r) is reported too, and the swaps beyond two standard deviations of a label apart from the
rest.

Curves: all layers at the narrowest option against two bits more of the same method. Layers are restored in the order of
predicted gain per byte until a share of the bytes is spent: how much of the loss is undone, on the same draws, by
surrogates, sensitivities, weight errors and chance? Run it again to go on (labels are kept in the run directory).
Writes eval/results/restore_MODEL.json.
"""

import argparse
import datetime
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantdm.allocation import select
from quantdm.files import read_json, write_json
from quantdm.machine import versions
from quantdm.metrics.samples import Draw
from quantdm.runs.engines.local import Engine
from quantdm.runs.explain import SURROGATES
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.trials import label_of, load_trials
from quantdm.runs.verify import verify
from quantdm.surrogates import SearchSpace, explain_one
from quantdm.surrogates.ranking import spearman

ROOT = Path(__file__).resolve().parents[1]
SHARES, RANDOM, BOOTSTRAP, TARGET = (0.05, 0.1, 0.2, 0.4, 0.7), 3, 2000, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--only", choices=["swaps", "curves"], default=None)
    arguments = parser.parse_args()
    run = Run.open(arguments.run_dir)
    space = load_space(run)
    trials = load_trials(run, space)
    fitted = {name: kind(space, random_state=run.settings.seed).fit(*trials) for name, kind in SURROGATES.items()}
    path = ROOT / "eval" / "results" / f"restore_{run.settings.model}.json"
    record: dict[str, Any] = read_json(path, version=1) if path.exists() else {"version": 1}
    record |= {"trials": len(trials[1]), "machine": platform.machine(), "versions": versions()}
    with Engine(run, run.open_subject(), workers=arguments.workers) as engine:
        for name, study in (("swaps", swaps), ("curves", curves)):
            if arguments.only in (None, name):
                record[name] = study(run, engine, space, fitted, arguments.swaps)
                record[name]["date"] = datetime.date.today().isoformat()
                write_json(path, record)
                print(name, record[name], flush=True)


def measure(run: Run, engine: Engine, space: SearchSpace, choices: np.ndarray, what: str) -> np.ndarray:
    """Return y of choices [N, L] on two draws that no trial used: [2, N]."""
    seed, images, steps = run.settings.seed, run.settings.label_images, run.settings.label_steps
    draws = [Draw(seed * 1000 + 501 + i, images, steps) for i in range(2)]
    configs = {str(index): space.config(row).to_labels() for index, row in enumerate(choices)}
    figures = verify(run, engine, configs, draws, what)
    return np.array([[label_of(row) for row in rows] for rows in figures.values()]).T


def swaps(run: Run, engine: Engine, space: SearchSpace, fitted: dict[str, Any], count: int) -> dict[str, Any]:
    """Swap one layer a time, as often in every operation type; compare predictions with both draws."""
    reference = select(space, -space.noise_error, target_bits=TARGET)
    rows = draw_swaps(space, reference, count)
    y = measure(run, engine, space, np.concatenate([reference[None], rows]), "swap one layer a time")
    delta = y[:, 1:] - y[:, :1]
    return judge_swaps(space, fitted, reference, rows, delta)


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
    space: SearchSpace, fitted: dict[str, Any], reference: np.ndarray, rows: np.ndarray, delta: np.ndarray
) -> dict[str, Any]:
    """Compare predicted with measured differences [2, N] of swapped configurations [N, L]."""
    told = {
        name: surrogate.predict(rows) - surrogate.predict(reference[None])  # one layer differs: all is its share
        for name, surrogate in fitted.items()
    }
    for name, table in (("noise errors", space.noise_error), ("weight errors", space.weight_error)):
        told[name] = (space.gather(table, reference) - space.gather(table, rows)).sum(axis=1)
    mean, repeat = delta.mean(axis=0), spearman(delta[0], delta[1])
    label_sd = float(np.std(delta[0] - delta[1]) / np.sqrt(2))
    large = np.abs(mean) > 2 * label_sd
    resamples = np.random.default_rng(0).integers(0, len(mean), (BOOTSTRAP, len(mean)))
    found = {}
    for name, values in told.items():
        rhos = [spearman(values[index], mean[index]) for index in resamples]
        found[name] = {
            "spearman": round(spearman(values, mean), 4),
            "interval": [round(float(q), 4) for q in np.quantile(rhos, [0.025, 0.975])],
            # the mean of two draws agrees better than one: Spearman-Brown's 2r / (1 + r)
            "over_ceiling": round(spearman(values, mean) / np.sqrt(2 * repeat / (1 + repeat)), 4)
            if repeat > 0
            else None,
            "large": round(spearman(values[large], mean[large]), 4) if large.sum() > 2 else None,
            "small": round(spearman(values[~large], mean[~large]), 4) if (~large).sum() > 2 else None,
        }
    return {
        "swaps": len(mean),
        "large": int(large.sum()),
        "label_sd": round(label_sd, 5),
        "agreement_of_draws": round(repeat, 4),
        "agreement": found,
    }


def curves(run: Run, engine: Engine, space: SearchSpace, fitted: dict[str, Any], _: int) -> dict[str, Any]:
    """Restore layers by every order until shares of the bytes are spent; return how much of the loss is undone."""
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
    orders |= {f"random {i}": rng.permutation(len(extra)) for i in range(RANDOM)}
    rows = [restored(x, reference, order, extra, share) for order in orders.values() for share in SHARES]
    y = measure(run, engine, space, np.stack([x, reference, *rows]), "restore layers")
    undone = ((y[:, 2:] - y[:, :1]) / (y[:, 1:2] - y[:, :1])).reshape(2, len(orders), len(SHARES))
    area = dict(zip(orders, undone.mean(axis=2).T, strict=True))  # of every draw
    chance = np.mean([area[f"random {i}"] for i in range(RANDOM)], axis=0)
    return {
        "from": space.labels[low],
        "to": space.labels[high],
        "shares_of_bytes": list(SHARES),
        "undone": {name: np.round(undone[:, i].mean(axis=0), 4).tolist() for i, name in enumerate(orders)},
        "area_per_draw": {name: np.round(value, 4).tolist() for name, value in area.items()},
        "area_over_random": {name: np.round(area[name] - chance, 4).tolist() for name in gains},
    }


def ends_of(space: SearchSpace) -> tuple[int, int]:
    """Return the option of fewest bits, and the one of its method that is two bits wider."""
    low = int(space.bits.sum(axis=0).argmin())
    own = space.options[low]
    for index, option in enumerate(space.options):
        if option.bits == own.bits + 2 and option.label == own.label.replace(f"-{own.bits}", f"-{option.bits}"):
            return low, index
    return low, int(space.bits.sum(axis=0).argmax())


def restored(x: np.ndarray, reference: np.ndarray, order: np.ndarray, extra: np.ndarray, share: float) -> np.ndarray:
    """Return x with layers restored in order as long as they fit into a share of all extra bits."""
    found, left = x.copy(), share * extra.sum()
    for layer in order:
        if extra[layer] <= left:
            found[layer], left = reference[layer], left - extra[layer]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
