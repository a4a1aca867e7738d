"""What exact dynamic programming, scikit-learn and flash1dkmeans make of rows; started by eval/bench_peers.py."""

import importlib
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

SKLEARN_ROWS = 8  # per set; it is slow


def exact_step() -> Callable[..., None]:
    """Return a compiled function that adds a cluster to D [n + 1], by divide and conquer over the last cut."""

    @importlib.import_module("numba").njit(cache=False)
    def add_cluster(best, s1, s2, new, stack):
        stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = 0, len(best) - 1, 0, len(best) - 1
        top = 1
        while top > 0:
            top -= 1
            low, high, first, last = stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3]
            if low > high:
                continue
            middle = (low + high) // 2
            least, place = np.inf, first
            for i in range(first, min(last, middle) + 1):
                count = middle - i
                total = s1[middle] - s1[i]
                cost = best[i]
                if count > 0:
                    cost += s2[middle] - s2[i] - total * total / count
                if cost < least:
                    least, place = cost, i
            new[middle] = least
            stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = low, middle - 1, first, place
            top += 1
            stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = middle + 1, high, place, last
            top += 1

    return add_cluster


def exact_solver() -> Callable[[np.ndarray, int], float]:
    """Return a compiled function (sorted row, k) -> least squared error."""
    add_cluster = exact_step()

    @importlib.import_module("numba").njit(cache=False)
    def solve(x, k):
        n = len(x)
        s1, s2 = np.zeros(n + 1), np.zeros(n + 1)
        for i in range(n):
            s1[i + 1], s2[i + 1] = s1[i] + x[i], s2[i] + x[i] * x[i]
        best, new = np.empty(n + 1), np.empty(n + 1)
        for j in range(n + 1):
            best[j] = s2[j] - s1[j] * s1[j] / max(j, 1)
        stack = np.empty((4 * n + 64, 4), np.int64)
        for _ in range(k - 1):
            add_cluster(best, s1, s2, new, stack)
            best, new = new, best
        return best[n]

    return solve


def error_of(row: np.ndarray, centers: np.ndarray) -> float:
    """Return the squared error of a row [n] under the nearest of some centers, in float64."""
    centers = np.sort(np.asarray(centers, np.float64).reshape(-1))
    codes = np.searchsorted((centers[1:] + centers[:-1]) / 2, row)
    return float(((row - centers[codes]) ** 2).sum())


def fit_rows(path: Path, out: Path) -> None:
    """Write, per set of rows and number of bits, the optimum of every row and what the peers reach and take."""
    cluster = importlib.import_module("sklearn.cluster")
    flash = importlib.import_module("flash1dkmeans")
    solve = exact_solver()
    solve(np.sort(np.random.default_rng(0).standard_normal(64)), 4)
    flash.kmeans_1d(np.random.default_rng(0).standard_normal(64).astype(np.float32), 4)
    record: dict[str, Any] = {}
    with safe_open(path, framework="np") as file:
        for key in file.keys():  # noqa: SIM118
            name, bits = key.rsplit("|", 1)
            rows = file.get_tensor(key).astype(np.float64)
            k = 2 ** int(bits)
            start = time.process_time()
            optimum = [solve(np.sort(row), k) for row in rows]
            found: dict[str, Any] = {"optimum": optimum}
            found["exact_ns"] = (time.process_time() - start) / rows.size * 1e9
            start, errors = time.process_time(), []
            for row in rows:
                centers, _ = flash.kmeans_1d(row.astype(np.float32), k)
                errors.append(error_of(row, centers))
            found["flash1dkmeans_ns"] = (time.process_time() - start) / rows.size * 1e9
            found["flash1dkmeans"] = errors
            some, errors, start = rows[:SKLEARN_ROWS], [], time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for i, row in enumerate(some):
                    fit = cluster.KMeans(k, n_init=1, random_state=i).fit(row[:, None].astype(np.float32))
                    errors.append(error_of(row, fit.cluster_centers_))
            found["sklearn_ns"] = (time.process_time() - start) / some.size * 1e9
            found["sklearn"] = errors
            record.setdefault(name, {})[bits] = found
            print(name, bits, flush=True)
    out.write_text(json.dumps(record))
