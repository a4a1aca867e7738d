"""What packed weights and 8-bit activations cost and save on a GPU: denoisers of PixArt's and SDXL's size at 1024 px.

    python eval/bench_cuda.py              # minutes, wants a GPU of 24 GB
    python eval/bench_cuda.py --tiny       # small ones, on the processor too, no record: does the script still run?

One call of two images in bf16. Weights are random in their stored form, so nothing has to be quantized; the dense
denoiser has the same weights decoded. Every way runs as it is called and, where it can be captured, as a CUDA graph,
which leaves out what the processor does between kernels. Writes eval/results/bench_cuda.json.
"""

import argparse
import copy
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from quantdm import ActivationSpec, Scheme, list_layers, set_activation_bits_, set_residency
from quantdm.files import write_json
from quantdm.machine import accelerator, versions
from quantdm.modules import quantize_module_
from quantdm.modules.packed import packed_layers
from quantdm.quantizers import QuantizedWeight, fused, stored_tensors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.architectures import DIGITS, PUBLIC

OUT = Path(__file__).parent / "results" / "bench_cuda.json"
ROUNDS, IMAGES = 10, 2
SCHEMES = ("kmeans-channel-4", "uniform-channel-4", "kmeans-channel-3")
TINY: dict[str, dict[str, Any]] = {
    "pixart-xl-2": {
        "sample_size": 16, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
        "cross_attention_dim": 32,
    },
    "sdxl": DIGITS["digits-sd"][1] | {
        "sample_size": 16, "transformer_layers_per_block": 1, "cross_attention_dim": 2048, "attention_head_dim": 5,
    },
}  # fmt: skip
GOALS = {"packed over dense": 1.10, "weight bytes over dense": 0.35, "8-bit activations": 1.2}


def denoiser(name: str, device: torch.device, *, tiny: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Return a denoiser with random weights and the arguments of a call."""
    kind, settings = PUBLIC[name]
    settings = {**settings, "sample_size": 128}
    if tiny:
        settings |= TINY[name]
    torch.manual_seed(0)
    with device:
        model = getattr(diffusers, kind)(**settings).to(dtype_on(device)).eval()
    side = settings["sample_size"]
    given: dict[str, Any] = {"device": device, "dtype": dtype_on(device)}
    call: dict[str, Any] = {"timestep": torch.full((IMAGES,), 500, device=device)}
    latents = torch.randn(IMAGES, 4, side, side, **given)
    if name.startswith("pixart"):
        call |= {"hidden_states": latents, "encoder_hidden_states": torch.randn(IMAGES, 120, 4096, **given)}
        call |= {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    else:
        call |= {"sample": latents, "encoder_hidden_states": torch.randn(IMAGES, 77, 2048, **given)}
        call |= {
            "added_cond_kwargs": {
                "text_embeds": torch.randn(IMAGES, 1280, **given), "time_ids": torch.ones(IMAGES, 6, **given)
            }
        }  # fmt: skip
    return model, call


def dtype_on(device: torch.device) -> torch.dtype:
    """Return bfloat16 on a GPU; some processors emulate it, fifty times as slowly."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def random_weight(shape: tuple[int, ...], scheme: Scheme, split: int | None, device: torch.device) -> QuantizedWeight:
    """Return a weight in its stored form: random codes, values of about N(0, 0.02^2)."""
    rng, k = torch.Generator(device).manual_seed(len(shape)), 2**scheme.bits
    tensors = {}
    for name, (size, dtype) in stored_tensors(shape, scheme, split).items():
        kind = name.partition(".")[0]
        if kind == "codes":
            tensors[name] = torch.randint(256, size, generator=rng, device=device, dtype=torch.uint8)
        elif kind == "codebook":
            tensors[name] = (
                torch.linspace(-127, 127, size[-1], device=device).round().to(dtype).expand(size).contiguous()
            )
        else:
            step = 0.035 / (127 if scheme.method == "kmeans" else k / 2)
            value = {"scale": step, "zero_point": k // 2, "factor": 1.0}[kind]
            tensors[name] = torch.full(size, value, dtype=dtype, device=device)
    return QuantizedWeight(scheme, shape, split, dtype_on(device), tensors)


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Return the median seconds of a call, after two that warm up."""
    taken = []
    for number in range(ROUNDS + 2):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number > 1:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def timed(model: nn.Module, call: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return milliseconds of a call as it is, and replayed from a CUDA graph (None: it cannot be captured)."""

    def forward() -> Tensor:
        return model(**call, return_dict=False)[0]

    row: dict[str, Any] = {"ms": round(1e3 * seconds(forward, device), 2), "graph_ms": None}
    if device.type == "cuda":
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = forward()
            row["graph_ms"] = round(1e3 * seconds(lambda: (graph.replay(), out)[1], device), 2)
        except RuntimeError as error:
            row["not_captured"] = str(error).splitlines()[0][:120]
            torch.cuda.synchronize()
    return row


def measure(name: str, label: str, device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Return the rows of one denoiser under one scheme."""
    model, call = denoiser(name, device, tiny=tiny)
    scheme = Scheme.parse(label)
    for layer in list_layers(model):
        if layer.num_weights >= 2**14:
            quantize_module_(model, layer.name, random_weight(layer.shape, scheme, layer.split, device))
    dense = copy.deepcopy(model)
    set_residency(dense, "dense")
    bytes_of = [sum(p.nbytes for p in model.parameters())]
    layers = packed_layers(model).values()
    whole = bytes_of[0] + sum(2 * torch.Size(each.weight_shape).numel() - each.packed.nbytes for each in layers)
    rows = {"dense": timed(dense, call, device)}
    expected = dense(**call, return_dict=False)[0]
    for way in ("packed, operation by operation", "packed"):
        fused.wanted = way == "packed"
        rows[way] = timed(model, call, device)
        difference = (model(**call, return_dict=False)[0] - expected).abs().max()
        rows[way]["difference"] = float(difference)
    del dense
    if scheme.method == "uniform" or scheme.table == "int8":
        rows["8-bit activations, integers"] = integers(model, call, device)
    return {"rows": rows, "weight_bytes": bytes_of[0], "dense_weight_bytes": whole}


def integers(model: nn.Module, call: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the row of 8-bit activations per token, multiplied in integers where the device can."""
    set_activation_bits_(model, ActivationSpec.model_validate({"default": "token-8"}))
    rest = set_residency(model, "integer")
    return timed(model, call, device) | {"layers_without_integers": len(rest)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-o", "--out", type=Path, default=OUT)
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cpu" and not given.tiny:
        raise SystemExit("bench_cuda: no GPU here; --tiny runs small denoisers on the processor")
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name in ("pixart-xl-2", "sdxl"):
            for label in SCHEMES:
                found[f"{name}, {label}"] = row = measure(name, label, device, tiny=given.tiny)
                print(name, label, *(f"\n  {way} {json.dumps(r)}" for way, r in row["rows"].items()), flush=True)
                print(f"  weights {row['weight_bytes'] / row['dense_weight_bytes']:.3f} of dense", flush=True)
                if not given.tiny:
                    write_json(given.out, record(found))


def record(found: dict[str, Any]) -> dict[str, Any]:
    """Return what is written."""
    return {
        "version": 1, "call": f"{IMAGES} images of 1024 px, bf16, random weights", "goals": GOALS, "models": found,
        "machine": accelerator(), "versions": versions(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
