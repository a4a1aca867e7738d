"""How fast peers compute linear layers with 4-bit or 8-bit weights and 8-bit inputs; started by bench_execution.py.

    python eval/bench_execution_peers.py OUT.json THREADS '[[1024, 1152, 4608]]'     # tokens, in, out

Every peer in the settings that are fastest here: integer products where it has them, compiled where it asks for that.
A peer that is not installed or fails is recorded with its error.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROUNDS = 15


def torchao(config: str, compiled: bool) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        ao = importlib.import_module("torchao.quantization")
        ao.quantize_(model, getattr(ao, config)())
        return torch.compile(model) if compiled else model

    return make


def sdnq(**settings: Any) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        quantizer = importlib.import_module("sdnq.quantizer")
        options = {"add_skip_keys": False, "torch_dtype": torch.bfloat16, "use_quantized_matmul": True}
        return quantizer.sdnq_post_load_quant(model, **options, **settings)

    return make


def quanto(weights: str, activations: str | None) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        lib = importlib.import_module("optimum.quanto")
        lib.quantize(model, weights=getattr(lib, weights), activations=activations and getattr(lib, activations))
        lib.freeze(model)
        return model

    return make


PEERS: dict[str, Callable[[nn.Module], Any]] = {
    "torchao int8 int8": torchao("Int8DynamicActivationInt8WeightConfig", compiled=False),
    "torchao int8 int8 compiled": torchao("Int8DynamicActivationInt8WeightConfig", compiled=True),
    "sdnq int8": sdnq(weights_dtype="int8"),
    "sdnq uint4": sdnq(weights_dtype="uint4"),
    "quanto int8 weights": quanto("qint8", None),
    "quanto int8 int8": quanto("qint8", "qint8"),
}


def best_ms(model: nn.Module, x: torch.Tensor) -> float:
    best = float("inf")
    for number in range(ROUNDS + 2):
        start = time.perf_counter()
        model(x)
        if number > 1:
            best = min(best, (time.perf_counter() - start) * 1e3)
    return best


@torch.no_grad()
def main() -> None:
    out, threads, sizes = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(threads)
    rows: dict[str, Any] = {}
    for tokens, width, features in sizes:
        x, found = torch.randn(tokens, width).bfloat16(), {}
        plain = nn.Sequential(nn.Linear(width, features)).bfloat16().eval()
        for name, make in PEERS.items():
            model = nn.Sequential(nn.Linear(width, features)).bfloat16().eval()
            try:
                peer = make(model)
                ms, floats = best_ms(peer, x), best_ms(plain, x)
                found[name] = {"ms": round(ms, 3), "bfloat16_ms": round(floats, 3), "speedup": round(floats / ms, 3)}
            except Exception as error:
                found[name] = {"error": (str(error).strip() or type(error).__name__).splitlines()[0][:120]}
            print(f"{tokens}x{width}x{features} {name}: {found[name]}", file=sys.stderr, flush=True)
        rows[f"{tokens}x{width}x{features}"] = found
    out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
