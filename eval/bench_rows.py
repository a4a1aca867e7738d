"""Per-channel k-means row by row: error over the exact optimum, and time, beside two public implementations."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantdm import get_denoiser, list_layers, load_pipeline
from quantdm.files import read_json, save_tensors
from quantdm.quantizers import quantize_weight
from quantdm.schemes import Scheme

BITS = (2, 3, 4, 5, 6)
TABLES = ("int8", "fp16")
ROWS, LENGTH = 64, 1152  # of the random sets
ROWS_PER_LAYER = 4  # of the pipelines, evenly spaced
TIMED = (1152, 1152)


def row_sets(models: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Return set -> part -> rows float32 [R, n]: random ones, and rows of every layer of the reference pipelines."""
    generator = np.random.default_rng(0)
    sets = {
        "Gaussian": {"": torch.from_numpy(generator.standard_normal((ROWS, LENGTH))).float()},
        "Student-t(4)": {"": torch.from_numpy(generator.standard_t(4, (ROWS, LENGTH))).float()},
    }
    for name in models:
        if name == "random-dit":  # its rows are Student-t ones
            continue
        denoiser = get_denoiser(load_pipeline(name))
        sets[name] = {}
        for layer in list_layers(denoiser):
            rows = denoiser.get_parameter(f"{layer.name}.weight").detach().flatten(1)
            step = max(len(rows) // ROWS_PER_LAYER, 1)
            if rows.shape[1] > 2 ** max(BITS):  # shorter rows are stored as they are
                sets[name][layer.name] = rows[::step][:ROWS_PER_LAYER].contiguous()
    return sets


def compare_rows(peers: Path, folder: Path, models: Sequence[str]) -> dict[str, Any]:
    """Return per set, bits and method: mean and worst squared error over the optimum, and ns per weight."""
    sets = row_sets(models)
    tensors = {
        f"{s}/{part}|{b}": rows.clone() for s, parts in sets.items() for part, rows in parts.items() for b in BITS
    }
    save_tensors(folder / "rows.safetensors", tensors)
    script = str(Path(__file__).with_name("bench_peers.py"))
    subprocess.run([peers, script, "rows", folder / "rows.safetensors", folder / "rows.json"], check=True)
    found = read_json(folder / "rows.json")
    record: dict[str, Any] = {"settings": {"rows": ROWS, "length": LENGTH, "rows_per_layer": ROWS_PER_LAYER, "seed": 0}}
    print(f"\n{'squared error / exact optimum':<26}{'bits':>5}{'mean':>8}{'worst':>8}{'ns/weight':>11}")
    for name, parts in sets.items():
        for bits in BITS:
            peer = [found[f"{name}/{part}"][str(bits)] for part in parts]
            optimum = np.concatenate([np.array(p["optimum"]) for p in peer])
            figures = {}
            for table in TABLES:
                scheme = Scheme.parse(f"kmeans-channel-{bits}" + ("-fp16" if table == "fp16" else ""))
                errors, ns = _quantdm(list(parts.values()), scheme)
                figures[f"quantdm {table}"] = _ratio(errors, optimum, ns)
            for method in ("sklearn", "flash1dkmeans"):
                few = [np.array(p["optimum"])[: len(p[method])] for p in peer]
                errors = np.concatenate([np.array(p[method]) for p in peer])
                ns = float(np.mean([p[f"{method}_ns"] for p in peer]))
                figures[method] = _ratio(errors, np.concatenate(few), ns)
            figures["exact"] = {"mean": 1.0, "worst": 1.0, "ns": round(float(np.mean([p["exact_ns"] for p in peer])))}
            record.setdefault(name, {})[str(bits)] = figures
            for method, row in figures.items():
                print(f"{name:<13}{method:<13}{bits:>5}{row['mean']:>8.4f}{row['worst']:>8.3f}{row['ns']:>11}")
    record["timed"] = _timed()
    print(f"ns per weight of a whole matrix {TIMED}, int8 table: {record['timed']}")
    return record


def _quantdm(parts: list[torch.Tensor], scheme: Scheme) -> tuple[np.ndarray, float]:
    errors, start = [], time.process_time()
    decoded = [quantize_weight(rows, scheme).dequantize() for rows in parts]
    ns = (time.process_time() - start) / sum(rows.numel() for rows in parts) * 1e9
    for rows, w_hat in zip(parts, decoded, strict=True):
        errors.append((rows.double() - w_hat.double()).square().sum(dim=1).numpy())
    return np.concatenate(errors), ns


def _timed() -> dict[str, int]:
    """Return ns per weight to quantize a matrix of Gaussian bf16 weights, all in: sort, fit, encode, pack."""
    weight = torch.randn(TIMED, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = {}
    for bits in BITS:
        times = []
        for _ in range(2):
            start = time.process_time()
            quantize_weight(weight, Scheme(method="kmeans", bits=bits))
            times.append(time.process_time() - start)
        found[str(bits)] = round(min(times) / weight.numel() * 1e9)
    return found


def _ratio(errors: np.ndarray, optimum: np.ndarray, ns: float) -> dict[str, float]:
    used = optimum > 1e-12 * optimum.max()  # a row of few distinct weights has no error to compare
    ratio = errors[used] / optimum[used]
    return {"mean": round(float(ratio.mean()), 5), "worst": round(float(ratio.max()), 4), "ns": round(ns)}
