"""How long surrogates take to fit and budgets to be spent, on planted labels and traced graphs.

PYTHONPATH=. python eval/bench_surrogates.py           # every measurement; or the names of some
Writes eval/results/surrogate_timing.json (measurements that are not asked for stay as they are). One thread.
"""

import argparse
import datetime
import time
from pathlib import Path

import numpy as np

from quantdm.allocation import select, select_lambda
from quantdm.files import read_json, write_json
from quantdm.machine import versions
from quantdm.surrogates import BlockScores, GraphSurrogate, TreeSurrogate, explain_one
from tests.planted import PlantedTruth, planted_space

OUT = Path(__file__).parent / "results" / "surrogate_timing.json"
FITS = {  # name: surrogate, denoiser, trials, the limit that was set (wall seconds on two quiet cores)
    "tree, digits-dit": (TreeSurrogate, "digits-dit", 400, 5),
    "tree, digits-sd": (TreeSurrogate, "digits-sd", 400, 5),
    "graph, digits-dit": (GraphSurrogate, "digits-dit", 400, 180),
    "graph, digits-sd": (GraphSurrogate, "digits-sd", 400, 180),
    "graph, pixart-xl-2": (GraphSurrogate, "pixart-xl-2", 500, 1800),
}
EXPLANATIONS = {"explain graph, digits-dit": ("digits-dit", 2), "explain graph, sdxl": ("sdxl", 30)}
SELECTIONS = ("layers", "lambda", "blocks")


def fit(name: str) -> dict:
    """Fit one surrogate in five folds and say how long it took and how well it ranks held-out trials."""
    kind, model, count, limit = FITS[name]
    space = planted_space(model=model)
    choices, y = PlantedTruth(space).trials(count)
    cpu, wall = time.process_time(), time.perf_counter()
    found = kind(space).fit(choices, y)
    return {
        "layers": len(space.layers),
        "trials": count,
        "cpu_s": round(time.process_time() - cpu, 1),
        "wall_s": round(time.perf_counter() - wall, 1),
        "limit_s": limit,
        "held_out_spearman": round(float(np.mean(found.cv_scores_)), 4),
        "held_out_ndcg10": round(float(np.mean(found.cv_ndcg_)), 4),
    }


def spend(how: str) -> dict:
    """Choose a configuration of SDXL at 3 bits by random additive values, over layers or over whole blocks."""
    space = planted_space(model="sdxl")
    values, blocks = -PlantedTruth(space).terms, []
    if how == "blocks":
        rng = np.random.default_rng(0)
        for block in space.graph.blocks:
            if block.hops:
                layers = tuple(space.layer_index[name] for name in block.layers)
                rows = np.array(list(np.ndindex(*[len(space.options)] * len(layers))))
                scores = values[layers, rows].sum(axis=1) * np.exp(0.1 * rng.normal(size=(5, len(rows))))
                blocks.append(BlockScores(block.name, layers, rows, scores))
        values = np.where(np.isin(np.arange(len(values)), [i for b in blocks for i in b.layers])[:, None], 0.0, values)
    cpu, wall = time.process_time(), time.perf_counter()
    if how == "lambda":
        choice, _ = select_lambda(space, values, target_bits=3.0)
    else:
        choice = select(space, values, blocks=blocks, target_bits=3.0)
    return {
        "layers": len(space.layers),
        "quantizers": sum(layer.quantizers for layer in space.layers),
        "options": len(space.options),
        "assignments": sum(len(block.assignments) for block in blocks),
        "cpu_s": round(time.process_time() - cpu, 2),
        "wall_s": round(time.perf_counter() - wall, 2),
        "limit_s": 5,
        "avg_bits": round(float(space.avg_bits(choice)[0]), 6),
    }


def explain(name: str) -> dict:
    """Explain one random configuration against another, by a graph surrogate of a few trials: it has all parameters."""
    model, limit = EXPLANATIONS[name]
    space = planted_space(model=model)
    choices, y = PlantedTruth(space).trials(40)
    found = GraphSurrogate(space).fit(choices, y)
    cpu, wall = time.process_time(), time.perf_counter()
    explained = explain_one(found, choices[0], choices[1])
    return {
        "layers": len(space.layers),
        "cpu_s": round(time.process_time() - cpu, 2),
        "wall_s": round(time.perf_counter() - wall, 2),
        "limit_s": limit,
        "error_of_the_sum": float(abs(explained.contributions.sum() - explained.difference)),
    }


def main() -> None:
    names = {**{name: (fit, name) for name in FITS}, **{f"select {how}, sdxl": (spend, how) for how in SELECTIONS}}
    names |= {name: (explain, name) for name in EXPLANATIONS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of: {'; '.join(names)}")
    asked = parser.parse_args().names or list(names)
    record = read_json(OUT, version=1) if OUT.exists() else {"version": 1, "measured": {}}
    for name in asked:
        run, argument = names[name]
        record["measured"][name] = {**run(argument), "date": datetime.date.today().isoformat()}
        record["versions"] = versions()
        print(name, record["measured"][name], flush=True)
        write_json(OUT, record)


if __name__ == "__main__":
    main()
