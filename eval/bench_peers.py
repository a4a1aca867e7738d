"""What the peers make of given weights; runs in an environment of its own, started by eval/bench_quantizers.py.

    python eval/bench_peers.py rows ROWS.safetensors OUT.json     # exact 1-D k-means, scikit-learn, flash1dkmeans
    python eval/bench_peers.py models OUT FOLDER [FOLDER ...]     # denoisers: weights as decoded, bytes, seconds

FOLDER is a bf16 diffusers model. Every peer is data-free, at its own defaults, and quantizes what it can: those that
know only linear layers leave convolutions in bf16. Bytes are of the tensors that it would save.
"""

import argparse
import importlib
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

SKLEARN_ROWS = 8  # per set; it is slow


# ------------------------------------------------------------------------------------------------- one-dimensional


def exact_solver() -> Callable[[np.ndarray, int], float]:
    """Return a compiled function (sorted row, k) -> least squared error, by divide and conquer over the last cut."""
    njit = importlib.import_module("numba").njit

    @njit(cache=False)
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
            top = 0
            stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = 0, n, 0, n
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


# ------------------------------------------------------------------------------------------------------ denoisers


def load(folder: Path) -> nn.Module:
    """Load a bf16 denoiser by the class that its config names."""
    diffusers = importlib.import_module("diffusers")
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.bfloat16).eval()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor, or of those inside a tensor subclass."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is not None and type(tensor) not in (torch.Tensor, nn.Parameter):
        return sum(bytes_of(getattr(tensor, name)) for name in inner()[0])
    return tensor.numel() * tensor.element_size()


def state_bytes(model: nn.Module) -> int:
    """Return the bytes of all tensors in a state dict."""
    return sum(bytes_of(t) for t in model.state_dict().values() if isinstance(t, torch.Tensor))


def bitsandbytes_nf4(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    functional = importlib.import_module("bitsandbytes").functional
    decoded, size = {}, state_bytes(model)
    for name, module in linears(model).items():
        # One row: on a CPU, bitsandbytes 0.50 decodes rows that are no multiple of its block of 64 wrongly.
        weight = module.weight.data.reshape(1, -1)
        packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        parts = [t for t in state.as_dict(packed=True).values() if isinstance(t, torch.Tensor)]
        size += bytes_of(packed) + sum(bytes_of(t) for t in parts) - bytes_of(weight)
        decoded[name] = functional.dequantize_4bit(packed, state)
    return decoded, size


def hqq_4_64(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    quantize = importlib.import_module("hqq.core.quantize")
    decoded, size = {}, state_bytes(model)
    for name, module in linears(model).items():
        if module.weight.numel() % 64:
            continue
        settings = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
        layer = quantize.HQQLinear(
            module, settings, compute_dtype=torch.bfloat16, device="cpu", del_orig=False, initialize=True
        )
        parts = [layer.W_q, layer.meta["scale"], layer.meta["zero"]]
        size += sum(bytes_of(t) for t in parts) - bytes_of(module.weight)
        decoded[name] = layer.dequantize()
    return decoded, size


def torchao_int4(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    ao = importlib.import_module("torchao.quantization")
    ao.quantize_(model, ao.Int4WeightOnlyConfig(group_size=128))
    return dequantized(model), state_bytes(model)


def torchao_intx4(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    """torchao's 4 bits on a CPU: saved as int8, one scale per group of 32."""
    ao = importlib.import_module("torchao.quantization")
    granularity = importlib.import_module("torchao.quantization.granularity")
    sizes = {n: m for n, m in linears(model).items() if m.in_features % 32 == 0}
    four = getattr(torch, "int4")  # noqa: B009 (torch's stubs do not know it)
    settings = ao.IntxWeightOnlyConfig(weight_dtype=four, granularity=granularity.PerGroup(32))
    ao.quantize_(model, settings, filter_fn=lambda module, name: name in sizes)
    return dequantized(model), state_bytes(model)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack quanto's planes of 2 or 4 bits, the lowest first."""
    return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])


def quanto(bits: int) -> Callable[[nn.Module], tuple[dict[str, torch.Tensor], int]]:
    def run(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
        package = importlib.import_module("optimum.quanto")
        extension = importlib.import_module("optimum.quanto.library.extensions.cpp").ext
        extension._lib = SimpleNamespace(unpack=unpack)  # its own would want a C++ compiler
        package.quantize(model, weights=getattr(package, f"qint{bits}"))
        package.freeze(model)
        return dequantized(model), state_bytes(model)

    return run


def sdnq(**settings: Any) -> Callable[[nn.Module], tuple[dict[str, torch.Tensor], int]]:
    def run(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
        os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"  # minutes of compiling per shape, for the same numbers
        quantizer = importlib.import_module("sdnq.quantizer")
        model = quantizer.sdnq_post_load_quant(
            model, quant_conv=True, add_skip_keys=False, torch_dtype=torch.bfloat16, **settings
        )
        size = state_bytes(model)
        plain = quantizer.dequantize_sdnq_model(model)
        return {n: m.weight.data for n, m in plain.named_modules() if weight_dims(m) >= 2}, size

    return run


def weight_dims(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight.dim() if isinstance(weight, torch.Tensor) and not isinstance(module, nn.Embedding) else 0


def dequantized(model: nn.Module) -> dict[str, torch.Tensor]:
    """Decode the weights that are tensor subclasses with a `dequantize` of their own."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and type(weight) not in (torch.Tensor, nn.Parameter):
            found[name] = weight.dequantize()
    return found


PEERS: dict[str, Callable[[nn.Module], tuple[dict[str, torch.Tensor], int]]] = {
    "bitsandbytes nf4 dq": bitsandbytes_nf4,
    "hqq 4b g64": hqq_4_64,
    "torchao int4": torchao_int4,
    "torchao intx4 g32": torchao_intx4,
    "quanto int4": quanto(4),
    "quanto int2": quanto(2),
    "sdnq uint4": sdnq(weights_dtype="uint4"),
    "sdnq uint4 codebook": sdnq(weights_dtype="uint4", use_codebook=True),
    "sdnq uint4 svd": sdnq(weights_dtype="uint4", use_svd=True),
}


@torch.no_grad()
def quantize_models(out: Path, folders: list[Path]) -> None:
    """Write out/MODEL.PEER.safetensors, the decoded weights of every layer that the peer quantized, and records.json.

    A peer that fails is recorded with its error; the next one goes on.
    """
    records: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for peer, quantize in PEERS.items():
            model = load(folder)
            original = {name: t.clone() for name, t in model.state_dict().items()}
            wall, cpu = time.monotonic(), time.process_time()
            try:
                decoded, size = quantize(model)
            except Exception as error:  # whatever a peer raises is its result here
                lines = str(error).strip().splitlines() or [""]
                record: dict[str, Any] = {"error": f"{type(error).__name__}: {lines[0]}"[:300]}
            else:
                record = {"bytes": size, "cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - wall}
                tensors = changed(decoded, original)
                record["quantized_layers"] = len(tensors)
                save_file(tensors, out / f"{folder.name}.{peer}.safetensors")
            records.setdefault(folder.name, {})[peer] = record
            print(folder.name, peer, record, flush=True)
            (out / "records.json").write_text(json.dumps(records))


def changed(decoded: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the decoded weights, in bf16 as they are used, that differ from the original ones."""
    tensors = {}
    for name, weight in decoded.items():
        reference = original[f"{name}.weight"]
        dense = weight.detach().to(torch.bfloat16).reshape(reference.shape).clone()
        if not torch.equal(dense, reference):
            tensors[f"{name}.weight"] = dense
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("rows")
    rows.add_argument("path", type=Path)
    rows.add_argument("out", type=Path)
    models = commands.add_parser("models")
    models.add_argument("out", type=Path)
    models.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "rows":
        fit_rows(arguments.path, arguments.out)
    else:
        quantize_models(arguments.out, arguments.folders)


if __name__ == "__main__":
    main()
