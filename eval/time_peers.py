"""What a call of a denoiser takes under the layers of peers; runs in their environment, started by step_times.py.

    python eval/time_peers.py FOLDER CALLS.safetensors OUT.json

FOLDER is a bf16 diffusers model. Every peer runs in its own layers, which decode their weights as they run; GGUF in
those of diffusers. Milliseconds per call, the best of the rounds; "original" is the model before it is quantized.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_peers import PEERS, SDNQ, hqq_layer, linears, load, sdnq_model
from safetensors import safe_open
from torch import nn

ROUNDS = 3
Call = tuple[list[Any], dict[str, Any]]


def exchanged(
    make: Callable[[nn.Linear], nn.Module], fits: Callable[[nn.Linear], bool]
) -> Callable[[nn.Module], nn.Module]:
    """Return what puts other layers in the place of the linear ones that fit."""

    def run(model: nn.Module) -> nn.Module:
        for name, module in linears(model).items():
            if fits(module):
                model.set_submodule(name, make(module))
        return model

    return run


def bitsandbytes_layer(module: nn.Linear) -> nn.Module:
    kind = importlib.import_module("bitsandbytes").nn.Linear4bit
    options: dict[str, Any] = {"compute_dtype": torch.bfloat16, "compress_statistics": True, "quant_type": "nf4"}
    layer = kind(module.in_features, module.out_features, module.bias is not None, **options)
    layer.load_state_dict(module.state_dict())
    return layer.to("cpu").eval()


def gguf_layer(kind: str) -> Callable[[nn.Linear], nn.Module]:
    def make(module: nn.Linear) -> nn.Module:
        package, utils = importlib.import_module("gguf"), importlib.import_module("diffusers.quantizers.gguf.utils")
        dtype = package.GGMLQuantizationType[kind]
        packed = torch.from_numpy(package.quants.quantize(module.weight.data.float().numpy(), dtype))
        sizes = (module.in_features, module.out_features, module.bias is not None)
        layer = utils.GGUFLinear(*sizes, compute_dtype=torch.bfloat16)
        layer.weight, layer.bias = utils.GGUFParameter(packed, quant_type=dtype), module.bias
        return layer.eval()

    return make


def changed_in_place(peer: str) -> Callable[[nn.Module], nn.Module]:
    def run(model: nn.Module) -> nn.Module:
        PEERS[peer](model)
        return model

    return run


def running(peer: str) -> Callable[[nn.Module], nn.Module]:
    """Return what makes a model run in a peer's layers."""
    library, *words = peer.split()
    if library == "sdnq":
        return lambda model: sdnq_model(model, **SDNQ[peer])
    if library == "hqq":
        bits, group = int(words[0][:-1]), int(words[1][1:])
        return exchanged(lambda m: hqq_layer(m, bits, group), lambda m: m.weight.numel() % group == 0)
    if library == "bitsandbytes":
        return exchanged(bitsandbytes_layer, lambda m: True)
    if library == "gguf":
        return exchanged(gguf_layer(words[0]), lambda m: m.in_features % 32 == 0)
    return changed_in_place(peer)


def read_calls(path: Path) -> list[Call]:
    """Return the calls that step_times.py wrote: tensors by name, what is none in the header."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        plain = json.loads(file.metadata()["quantdm"])["calls"]
    calls: list[Call] = []
    for i, call in enumerate(plain):
        args = [tensors.get(f"{i}.{j}", value) for j, value in enumerate(call["args"])]
        calls.append((args, {name: tensors.get(f"{i}.{name}", value) for name, value in call["kwargs"].items()}))
    return calls


def milliseconds(model: nn.Module, calls: list[Call]) -> float:
    """Return the milliseconds of a call, the best of the rounds after one that warms up."""
    best = float("inf")
    for number in range(ROUNDS + 1):
        start = time.perf_counter()
        for args, kwargs in calls:
            model(*args, **kwargs)
        if number:
            best = min(best, (time.perf_counter() - start) / len(calls) * 1e3)
    return best


@torch.no_grad()
def main() -> None:
    folder, calls, out = Path(sys.argv[1]), read_calls(Path(sys.argv[2])), Path(sys.argv[3])
    torch.set_num_threads(1)
    found: dict[str, Any] = {"original": {"ms": milliseconds(load(folder), calls)}}
    for peer in PEERS:
        try:
            found[peer] = {"ms": milliseconds(running(peer)(load(folder)), calls)}
        except Exception as error:  # whatever a peer raises is its result here
            lines = str(error).strip().splitlines() or [""]
            found[peer] = {"error": f"{type(error).__name__}: {lines[0]}"[:300]}
        print(folder.name, peer, found[peer], flush=True)
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
