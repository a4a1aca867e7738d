"""What 8-bit arithmetic is worth on this processor: products, convolutions, a block of DiT-XL/2, the digits pipelines.

    python eval/bench_execution.py                      # all of it, two threads: minutes, wants a quiet machine
    python eval/bench_execution.py --peers .peers/bin/python   # also sdnq, torchao and quanto
    python eval/bench_execution.py --tiny               # small sizes, no record: does the script still run?

The environment of the peers: see eval/bench_quantizers.py; they run in a process of their own, beside bf16 there.
Weights have 4 bits, inputs 8 per token (convolutions: per sample), quantized again in every call. Ways to compute the
same run in alternating rounds; the best round of each counts. Writes eval/results/bench_execution.json.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from bench_quantizers import peer_versions
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from quantdm import ActivationSpec, list_layers, set_activation_bits_, set_residency
from quantdm.activations.codes import Grid, new_codes
from quantdm.activations.rounding import quantize_activations
from quantdm.cli.bench import bench_model
from quantdm.files import read_json, write_json
from quantdm.machine import cpu_features, versions
from quantdm.modules import quantize_module_
from quantdm.modules.kernels import compile_kernels
from quantdm.modules.packed import PackedLayer
from quantdm.pipelines.known import known_pipelines
from quantdm.quantizers import quantize_weight
from quantdm.quantizers.equaliser import shifted
from quantdm.recipe import ActivationScheme
from quantdm.schemes import Scheme

OUT = Path(__file__).parent / "results" / "bench_execution.json"
ROUNDS, WEIGHTS, INPUTS = 15, "uniform-channel-4", "token-8"
LINEAR = ((1024, 1152, 4608), (4096, 1152, 1152), (4096, 640, 2560))  # tokens, in, out
CONV = ((320, 64), (640, 32))  # channels, side
BLOCK_IMAGES, BLOCK_SIDE, HEADS = 2, 64, 16  # 1,024 tokens an image
TINY: dict[str, Any] = {"linear": ((64, 96, 80),), "conv": ((16, 8),), "side": 8, "heads": 2, "images": 2, "steps": 2}
GOALS = {"linear": 1.8, "conv": 1.3, "block": 1.4}
DIT = {
    "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "patch_size": 2,
    "num_layers": 1, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "attention_bias": True,
    "activation_fn": "gelu-approximate",
}  # fmt: skip


def best_ms(ways: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the milliseconds of the best of alternating rounds, after two that warm up."""
    best = dict.fromkeys(ways, float("inf"))
    for number in range(rounds + 2):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            if number > 1:
                best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def packed(layer: nn.Module, weight: Tensor) -> PackedLayer:
    """Return the packed layer, in integer residency."""
    model = nn.Sequential(layer)
    quantize_module_(model, "0", quantize_weight(weight, Scheme.parse(WEIGHTS), name="0"))
    set_residency(model, "integer")
    own = model[0]
    assert isinstance(own, PackedLayer)
    return own


def figures(best: dict[str, float], distance: float) -> dict[str, Any]:
    """Return the row of some ways: milliseconds, and how much faster the fastest integers are than floats."""
    integers = min(ms for name, ms in best.items() if name.startswith("integer"))
    floats = min(ms for name, ms in best.items() if not name.startswith(("integer", "simulated")))
    ms = {name: round(value, 3) for name, value in best.items()}
    return {"ms": ms, "speedup": round(floats / integers, 3), "distance": float(f"{distance:.1e}")}


def compare(layer: nn.Module, x: Tensor, scheme: ActivationScheme, grid: Grid) -> dict[str, Any]:
    """Return the row of one layer: float32 and bf16 dense, bf16 simulated, integers."""
    wide, x32 = layer, x.float()
    narrow: nn.Module = type(layer)(**_geometry(layer)).to(torch.bfloat16)
    narrow.load_state_dict(layer.state_dict())
    own = packed(type(layer)(**_geometry(layer)).to(torch.bfloat16), layer.get_parameter("weight").detach().bfloat16())
    own.load_state_dict({"bias": layer.get_parameter("bias")}, strict=False)
    ways: dict[str, Callable[[], Tensor]] = {"float32": lambda: wide(x32), "bfloat16": lambda: narrow(x)}
    if x.dim() == 4:
        swept = x.to(memory_format=torch.channels_last)
        last: Any = type(layer)(**_geometry(layer))
        last = last.to(torch.bfloat16, memory_format=torch.channels_last)
        ways["bfloat16 channels last"] = lambda: last(swept)
        ways["integer channels last"] = lambda: own.multiply(new_codes(swept, scheme, grid))
    ways["integer"] = lambda: own.multiply(new_codes(x, scheme, grid))
    row = figures(best_ms(ways), 0.0)
    dense = own.dequantize(dtype=torch.float32)
    rounded = quantize_activations(x32, scheme, dims=grid.dims, channel=grid.channel)
    expected = torch.func.functional_call(wide, {"weight": dense, "bias": own.bias.float()}, (rounded,))  # pyright: ignore
    distance = (own.multiply(new_codes(x32, scheme, grid)) - expected).norm() / expected.norm()
    return row | {"distance": float(f"{float(distance):.1e}")}


def _geometry(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    assert isinstance(layer, nn.Conv2d)
    return {"in_channels": layer.in_channels, "out_channels": layer.out_channels, "kernel_size": 3, "padding": 1}


def linears(sizes: tuple[tuple[int, int, int], ...]) -> dict[str, Any]:
    grid, rows = Grid(-1, -1, None, None), {}
    for tokens, width, out in sizes:
        x = torch.randn(tokens, width).bfloat16()
        rows[f"{tokens}x{width}x{out}"] = compare(nn.Linear(width, out), x, ActivationScheme.parse(INPUTS), grid)
    return with_mean(rows)


def convs(sizes: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    grid, rows = Grid((1, 2, 3), 1, None, None), {}
    for channels, side in sizes:
        x = torch.randn(1, channels, side, side).bfloat16()
        layer = nn.Conv2d(channels, channels, 3, padding=1)
        rows[f"{channels}@{side}x{side}"] = compare(layer, x, ActivationScheme.parse(INPUTS), grid)
    return with_mean(rows)


def codings(sizes: tuple[tuple[int, int, int], ...]) -> dict[str, Any]:
    """Return ms of quantizing inputs alone: plain, and with an equaliser, multiplied on the way or in its own pass."""
    grid, rows = Grid(-1, -1, None, None), {}
    for tokens, width in dict.fromkeys((tokens, width) for tokens, width, _ in sizes):
        x, exponents = torch.randn(tokens, width).bfloat16(), torch.randint(-3, 4, (width,)).to(torch.int8)
        plain, turned = ActivationScheme.parse(INPUTS), ActivationScheme.parse(f"{INPUTS}-equalised")
        equalised = grid._replace(exponents=exponents)
        ways: dict[str, Callable[[], object]] = {
            "plain": partial(new_codes, x, plain, grid),
            "equalised": partial(new_codes, x, turned, equalised),
            "equalised in its own pass": lambda x=x, e=exponents, s=plain: new_codes(shifted(x, e, -1, -1), s, grid),
        }
        rows[f"{tokens}x{width}"] = {name: round(ms, 3) for name, ms in best_ms(ways).items()}
    return rows


def with_mean(rows: dict[str, Any]) -> dict[str, Any]:
    speedups = [row["speedup"] for row in rows.values()]
    return {**rows, "geometric_mean": round(prod(speedups) ** (1 / len(speedups)), 3)}


def block(side: int, heads: int) -> dict[str, Any]:
    """Return the row of a DiT-XL/2 of one block with its ends, two images: bf16, simulated, integers."""
    sizes: dict[str, Any] = {**DIT, "num_attention_heads": heads, "sample_size": side}
    make: Any = DiTTransformer2DModel
    original, model = (make(**sizes).to(torch.bfloat16).eval() for _ in range(2))
    model.load_state_dict(original.state_dict())
    for layer in list_layers(model):
        weight = model.get_parameter(f"{layer.name}.weight").detach()
        quantize_module_(model, layer.name, quantize_weight(weight, Scheme.parse(WEIGHTS), name=layer.name))
    set_activation_bits_(model, ActivationSpec(default=INPUTS))
    latents = torch.randn(BLOCK_IMAGES, 4, side, side).bfloat16()
    given = {"timestep": torch.tensor([500] * BLOCK_IMAGES), "class_labels": torch.arange(BLOCK_IMAGES)}
    set_residency(model, "dense")
    expected = model(latents, **given).sample.float()
    simulated = best_ms({"simulated": lambda: model(latents, **given)}, 3)
    set_residency(model, "integer")
    best = best_ms({"bfloat16": lambda: original(latents, **given), "integer": lambda: model(latents, **given)})
    y = model(latents, **given).sample.float()
    return figures(best | simulated, float((y - expected).norm() / expected.norm()))


def digits(images: int, steps: int) -> dict[str, Any]:
    """Return ms per step of the digits pipelines in every residency, and whether auto is ever slower than dense."""
    found = {}
    for name in known_pipelines():
        options: dict[str, Any] = {"scheme": WEIGHTS, "recipe": None, "activations": INPUTS, "protocol": None}
        record = bench_model(name, images=images, steps=steps, **options)
        rows = {row["residency"]: row for row in record["rows"]}
        found[name] = {
            "ms_per_step": {residency: round(row["ms"], 2) for residency, row in rows.items()},
            "distance": {residency: row["distance"] for residency, row in rows.items()},
            "auto_over_dense": round(rows["auto"]["ms"] / rows["dense"]["ms"], 3),
            "auto_over_original": round(rows["auto"]["ms"] / rows["original"]["ms"], 3),
            "images": images,
        }
    return found


def peers(python: Path, sizes: tuple[tuple[int, int, int], ...], threads: int) -> dict[str, Any]:
    """Return ms of the same linear layers under peers, and the versions of these."""
    script = Path(__file__).with_name("bench_execution_peers.py")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "peers.json"
        subprocess.run([python, script, out, str(threads), json.dumps(sizes)], check=True)
        return {"rows": read_json(out), "versions": peer_versions(python)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, help="the Python that has sdnq, torchao and optimum-quanto")
    parser.add_argument("--tiny", action="store_true", help="small sizes, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tiny = arguments.tiny
    linear, conv = (TINY["linear"], TINY["conv"]) if tiny else (LINEAR, CONV)
    sides = (TINY["side"], TINY["heads"]) if tiny else (BLOCK_SIDE, HEADS)
    if not tiny:
        compile_kernels()
    record: dict[str, Any] = {"linear": linears(linear), "conv": convs(conv), "block": block(*sides)}
    record["coding"] = codings(linear)
    record["digits"] = digits(*((TINY["images"], TINY["steps"]) if tiny else (64, 8)))
    if arguments.peers:
        record["peers"] = peers(arguments.peers, linear, arguments.threads)
    record["goals"] = GOALS
    record["settings"] = {"weights": WEIGHTS, "inputs": INPUTS, "rounds": ROUNDS, "best_of_rounds": True}
    record["versions"] = versions()
    record["machine"] = f"{platform.machine()} ({', '.join(cpu_features())}), {os.cpu_count()} cores"
    record["threads"] = arguments.threads
    record["load"] = round(os.getloadavg()[0], 1)
    record["date"] = datetime.date.today().isoformat()
    print(json.dumps(record, indent=1))
    if not tiny:
        write_json(OUT, record)


if __name__ == "__main__":
    main()
