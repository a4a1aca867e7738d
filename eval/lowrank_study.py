"""Does a low-rank branch help? The error of layers' outputs at equal bits, with branches and without, layer by layer.

    python eval/lowrank_study.py --model digits-dit

Every layer is quantized with calibrated schemes with and without branches of several ranks. A branch is compared with
what its bits buy otherwise: the lower convex hull, in log error over bits, of k-means per channel alone ("wider": the
next width takes over by and by), and of all default options of a search. Then knapsacks at several sizes choose among
the default options, with branches or with fp16 tables as well, by the sum of relative output errors. Writes
eval/results/lowrank_MODEL.json.
"""

import argparse
import datetime
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantdm import CalibrationSpec, get_denoiser, list_layers, load_pipeline
from quantdm.activations.calibration import calibrate
from quantdm.allocation.knapsack import solve_knapsack
from quantdm.files import write_json
from quantdm.machine import cores, versions
from quantdm.pipelines.parts import find_denoisers
from quantdm.progress import bar
from quantdm.quantizers import quantize_options
from quantdm.quantizers.objective import OutputError
from quantdm.quantizers.worth import bits_of, is_wasteful
from quantdm.schemes import DEFAULT_OPTIONS, ORIGINAL, Scheme

OUT = Path(__file__).parent / "results"
WIDTHS, RANKS, TARGETS, IMAGES = (2, 3), (2, 8), (2.25, 2.5, 3.0, 3.5, 4.0), 16
PLAIN = tuple(scheme for scheme in DEFAULT_OPTIONS if scheme != ORIGINAL)
BASES = tuple(
    Scheme(method="kmeans", bits=bits, granularity=granularity, calibration="feedback")  # pyright: ignore
    for granularity in ("channel",)
    for bits in WIDTHS
)
TABLES = tuple(base.model_copy(update={"table": "fp16"}) for base in BASES)
BRANCHED = tuple(base.model_copy(update={"lowrank": rank}) for base in BASES for rank in RANKS)


def measure(model: str, every: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Return layer -> label -> (bits per weight, relative output error) of one layer in `every`."""
    pipe = load_pipeline(model)
    layers = list_layers(get_denoiser(pipe))[::every]
    (part, denoiser), *_ = find_denoisers(pipe).items()
    names = [layer.name for layer in layers]
    moments = calibrate(pipe, CalibrationSpec(protocol=model, images=IMAGES), {part: names})[part]
    found: dict[str, dict[str, tuple[float, float]]] = {}
    with bar(len(layers), "layers") as progress:
        for layer in layers:
            weight, own = denoiser.get_parameter(f"{layer.name}.weight").detach().float(), moments[layer.name]
            rank = min(layer.shape[0], weight[0].numel())
            schemes = [s for s in (*PLAIN, *TABLES, *BRANCHED) if (s.lowrank or 0) <= rank]
            schemes = [s for s in schemes if not is_wasteful(layer.shape, s, layer.split)]
            error = OutputError(weight.flatten(1), own.second)
            power = float(error.of_rows(torch.zeros_like(weight.flatten(1))).sum())
            quantized = quantize_options(weight, schemes, split=layer.split, name=layer.name, moments=own)
            found[layer.name] = {
                scheme.label: (
                    bits_of(layer.shape, scheme, layer.split),
                    float(error.of_rows(each.dequantize(dtype=torch.float32).flatten(1)).sum()) / power,
                )
                for scheme, each in zip(schemes, quantized, strict=True)
            }
            progress.update()
    return found


def hull_at(points: list[tuple[float, float]], bits: float) -> float | None:
    """Return the error at some bits on the lower convex hull of (bits, log error); None: beyond its ends."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted((b, float(np.log(e))) for b, e in points):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        if not hull or y < hull[-1][1]:
            hull.append((x, y))
    if not hull[0][0] <= bits <= hull[-1][0]:
        return None
    xs, ys = zip(*hull, strict=True)
    return float(np.exp(np.interp(bits, xs, ys)))


def at_equal_bits(found: dict[str, dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """Return for every scheme with a branch its error over that of the hulls at equal bits, over the layers."""
    alike = [f"kmeans-channel-{bits}-feedback" for bits in (2, 3, 4)]
    rows: dict[str, Any] = {}
    for scheme in BRANCHED:
        ratios: dict[str, list[tuple[float, str]]] = {"wider": [], "options": []}
        for name, row in found.items():
            if scheme.label not in row:
                continue
            bits, error = row[scheme.label]
            plain = {label: point for label, point in row.items() if "lowrank" not in label and "fp16" not in label}
            for kind, points in (("wider", [plain[k] for k in alike if k in plain]), ("options", [*plain.values()])):
                other = hull_at(points, bits) if points else None
                if other is not None:
                    ratios[kind].append((error / other, name))
        rows[scheme.label] = {
            kind: {
                "layers": len(each),
                "geometric_mean": round(float(np.exp(np.mean(np.log([ratio for ratio, _ in each])))), 4),
                "best": [round(min(each)[0], 4), min(each)[1]],
                "wins": sum(ratio < 1 for ratio, _ in each),
            }
            for kind, each in ratios.items()
            if each
        }
    return rows


def knapsacks(found: dict[str, dict[str, tuple[float, float]]], weights: dict[str, int]) -> list[dict[str, Any]]:
    """Return for every size the sum of relative errors of the best choices without and with branches."""
    rows = []
    for target in TARGETS:
        row: dict[str, Any] = {"target_bits": target}
        for kind, allowed in (("without", ()), ("fp16_tables", TABLES), ("with", BRANCHED)):
            labels = [s.label for s in (*PLAIN, *allowed)]
            own = {name: [label for label in labels if label in found[name]] for name in found}
            bits = [np.array([round(found[n][k][0] * weights[n]) for k in own[n]], dtype=np.int64) for n in found]
            values = [-np.array([found[n][k][1] for k in own[n]]) for n in found]
            budget = int(target * sum(weights.values()))
            if budget < sum(int(each.min()) for each in bits):
                continue
            picked = solve_knapsack(values, bits, budget)
            row[kind] = round(-sum(float(v[i]) for v, i in zip(values, picked, strict=True)), 6)
            chosen = [own[name][i] for name, i in zip(found, picked, strict=True)]
            row["layers_with_fp16_tables"] = row.get("layers_with_fp16_tables", 0) + sum("fp16" in k for k in chosen)
            if kind == "with":
                row["layers_with_branches"] = sum("lowrank" in label for label in chosen)
                row["branches"] = sorted({label for label in chosen if "lowrank" in label})
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-dit")
    parser.add_argument("--every", type=int, default=1, help="of so many layers one")
    arguments = parser.parse_args()
    model = arguments.model
    torch.set_num_threads(1)
    found = measure(model, arguments.every)
    layers = list_layers(get_denoiser(load_pipeline(model)))
    weights = {layer.name: layer.num_weights for layer in layers if layer.name in found}
    record = {
        "model": model,
        "calibration_images": IMAGES,
        "layers": f"{len(found)} of {len(layers)}",
        "error_over_that_of_the_hull_at_equal_bits": at_equal_bits(found),
        "knapsacks_by_sum_of_relative_output_errors": knapsacks(found, weights),
        "machine": f"{platform.machine()}, {cores()} cores",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    write_json(OUT / f"lowrank_{model}.json", record)
    for label, row in record["error_over_that_of_the_hull_at_equal_bits"].items():
        print(f"{label:40} {row}")
    for row in record["knapsacks_by_sum_of_relative_output_errors"]:
        print(row)


if __name__ == "__main__":
    main()
