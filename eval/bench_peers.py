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
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peers_rows import fit_rows
from safetensors.torch import save_file
from torch import nn


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


def hqq_layer(module: nn.Linear, bits: int, group: int) -> Any:
    """Return a layer of hqq in the place of a linear one."""
    quantize = importlib.import_module("hqq.core.quantize")
    settings = quantize.BaseQuantizeConfig(nbits=bits, group_size=group)
    options: dict[str, Any] = {"compute_dtype": torch.bfloat16, "device": "cpu", "del_orig": False, "initialize": True}
    return quantize.HQQLinear(module, settings, **options)


def hqq(bits: int, group: int) -> Callable[[nn.Module], tuple[dict[str, torch.Tensor], int]]:
    def run(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
        decoded, size = {}, state_bytes(model)
        for name, module in linears(model).items():
            if module.weight.numel() % group:
                continue
            layer = hqq_layer(module, bits, group)
            parts = [layer.W_q, layer.meta["scale"], layer.meta["zero"]]
            size += sum(bytes_of(t) for t in parts) - bytes_of(module.weight)
            decoded[name] = layer.dequantize()
        return decoded, size

    return run


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


def sdnq_model(model: nn.Module, **settings: Any) -> nn.Module:
    """Return a model in the layers of sdnq."""
    os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"  # minutes of compiling per shape, for the same numbers
    options: dict[str, Any] = {"quant_conv": True, "add_skip_keys": False, "torch_dtype": torch.bfloat16, **settings}
    return importlib.import_module("sdnq.quantizer").sdnq_post_load_quant(model, **options)


def sdnq(**settings: Any) -> Callable[[nn.Module], tuple[dict[str, torch.Tensor], int]]:
    def run(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
        model = sdnq_model(model, **settings)
        size = state_bytes(model)
        plain = importlib.import_module("sdnq.quantizer").dequantize_sdnq_model(model)
        return {n: m.weight.data for n, m in plain.named_modules() if weight_dims(m) >= 2}, size

    return run


def gguf(kind: str) -> Callable[[nn.Module], tuple[dict[str, torch.Tensor], int]]:
    """A type of GGUF whose blocks have 32 weights; those of 256 (Q4_K, Q3_K) only the package's readers know."""

    def run(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
        package = importlib.import_module("gguf")
        dtype, decoded, size = package.GGMLQuantizationType[kind], {}, state_bytes(model)
        for name, module in linears(model).items():
            if module.in_features % 32:
                continue
            packed = package.quants.quantize(module.weight.data.float().numpy(), dtype)
            size += packed.nbytes - bytes_of(module.weight)
            decoded[name] = torch.from_numpy(package.quants.dequantize(packed, dtype))
        return decoded, size

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


SDNQ: dict[str, dict[str, Any]] = {
    "sdnq uint4": {"weights_dtype": "uint4"},
    "sdnq uint4 codebook": {"weights_dtype": "uint4", "use_codebook": True},
    "sdnq uint4 svd": {"weights_dtype": "uint4", "use_svd": True},
    "sdnq uint3": {"weights_dtype": "uint3"},
    "sdnq uint2": {"weights_dtype": "uint2"},
}
PEERS: dict[str, Callable[[nn.Module], tuple[dict[str, torch.Tensor], int]]] = {
    "bitsandbytes nf4 dq": bitsandbytes_nf4,
    "hqq 4b g64": hqq(4, 64),
    "hqq 3b g64": hqq(3, 64),
    "hqq 2b g32": hqq(2, 32),
    "torchao int4": torchao_int4,
    "torchao intx4 g32": torchao_intx4,
    "quanto int4": quanto(4),
    "quanto int2": quanto(2),
    **{name: sdnq(**settings) for name, settings in SDNQ.items()},
    "gguf Q4_0": gguf("Q4_0"),
    "gguf Q5_0": gguf("Q5_0"),
    "gguf Q8_0": gguf("Q8_0"),
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
