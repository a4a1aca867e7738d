"""Whole denoisers at equal bytes: the signal-to-noise ratio of the output under quantdm's schemes and under peers'.

Reference: float32 arithmetic with the bf16 weights that everybody starts from. Decoded weights are used in bf16, as a
user would, and the forward runs in float32, so that only the weights differ.
"""

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from quantdm import get_denoiser, list_layers, load_pipeline, load_protocol
from quantdm.activations.moments import gather_moments
from quantdm.denoisers.calls import Call, replay
from quantdm.denoisers.inventory import LayerRecord
from quantdm.files import load_tensors, read_json
from quantdm.metrics import relative_error
from quantdm.pipelines.generate import calibration_calls
from quantdm.quantizers import Moments, quantize_options, quantize_weight, stored_tensors
from quantdm.schemes import Scheme

OPTIONS = tuple(
    Scheme.parse(label)
    for label in (
        *(f"kmeans-channel-{bits}" for bits in (2, 3, 4, 5, 6)),
        "kmeans-shared64-3",
        "kmeans-shared64-4",
        "uniform-channel-8",
    )
)
LABELS = (*(scheme.label for scheme in OPTIONS), "original")  # a layer may stay in bf16, as peers leave convolutions
CALIBRATIONS = ("importance", "feedback")
CALIBRATED_AT = ("bitsandbytes nf4 dq", "quanto int2")  # sizes at which calibrated rows are shown too
CALIBRATION_SEEDS, HELD_OUT_SEEDS, STEPS = range(8), range(100, 108), 8
MIDDLE = (1, 3, 4, 6)  # calls of a trajectory that are compared; the extreme timesteps drown the others
DIT = {
    "num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12, "in_channels": 4, "out_channels": 8,
    "sample_size": 16, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False, "activation_fn": "gelu-approximate", "attention_bias": True,
}  # fmt: skip


def random_dit() -> DiTTransformer2DModel:
    """Return a DiT of about 34 M Student-t(4) weights of variance 1/fan-in, biases zero."""
    model, generator = DiTTransformer2DModel(**DIT), np.random.default_rng(0)  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data.zero_()
        else:
            spread = (2 * parameter[0].numel()) ** -0.5 if "embedding_table" not in name else 0.7
            drawn = generator.standard_t(4, size=tuple(parameter.shape))
            parameter.data.copy_(torch.from_numpy(drawn * spread))
    return model.eval()


def dit_calls(model: nn.Module, seed: int) -> list[Call]:
    """Return calls of a random DiT on Gaussian latents, four timesteps of eight images."""
    generator, calls = torch.Generator().manual_seed(seed), []
    for t in (50, 300, 600, 900):
        latents = torch.randn(8, 4, 16, 16, generator=generator)
        labels = torch.randint(10, (8,), generator=generator)
        arguments = {"timestep": torch.full((8,), t), "class_labels": labels}
        calls.append(Call((latents,), arguments, torch.zeros(1)))
    return with_outputs(model, calls)


def with_outputs(model: nn.Module, calls: Sequence[Call]) -> list[Call]:
    outputs = replay(model, calls)
    return [Call(call.args, call.kwargs, output) for call, output in zip(calls, outputs, strict=True)]


class Case:
    """One denoiser in bf16 weights and float32 arithmetic, with calls for calibration and held-out ones."""

    def __init__(self, name: str, folder: Path) -> None:
        self.pipe: Any = None if name == "random-dit" else load_pipeline(name)
        self.model: Any = random_dit() if self.pipe is None else get_denoiser(self.pipe)
        self.model.to(torch.bfloat16).save_pretrained(folder / name)
        self.model.to(torch.float32)
        if self.pipe is None:
            self.calibration, self.held_out = dit_calls(self.model, 1), dit_calls(self.model, 2)
        else:
            protocol = load_protocol(name)
            self.calibration = calibration_calls(self.pipe, protocol, CALIBRATION_SEEDS, steps=STEPS)
            calls = calibration_calls(self.pipe, protocol, HELD_OUT_SEEDS, steps=STEPS)
            self.held_out = [calls[i] for i in MIDDLE]
        self.layers: tuple[LayerRecord, ...] = list_layers(self.model)
        parameters = sum(t.numel() for t in self.model.state_dict().values())
        self.rest_bytes = 2 * (parameters - sum(layer.num_weights for layer in self.layers))

    def weight(self, name: str) -> torch.Tensor:
        return self.model.get_parameter(f"{name}.weight").detach()

    def sqnr(self, weights: dict[str, torch.Tensor]) -> float:
        """Return the SQNR in dB of the output on the held-out calls under some other weights."""
        originals = {}
        try:
            for name, weight in weights.items():
                parameter = self.model.get_parameter(name)
                originals[name], parameter.data = parameter.data, weight.float()
            outputs = replay(self.model, self.held_out)
        finally:
            for name, data in originals.items():
                self.model.get_parameter(name).data = data
        pairs = zip(outputs, self.held_out, strict=True)
        return -10 * float(np.log10(np.mean([relative_error(out, call.output) for out, call in pairs])))


def stored_bytes(layer: LayerRecord, scheme: Scheme) -> int:
    sizes = stored_tensors(layer.shape, scheme, layer.split).values()
    return sum(int(np.prod(size)) * dtype.itemsize for size, dtype in sizes)


class Choices:
    """Every layer of a case under every option of LABELS, data-free: bytes, relative squared error, decoded weight."""

    def __init__(self, case: Case) -> None:
        self.case, self.decoded = case, []
        start = time.process_time()
        self.bytes = np.array([[*(stored_bytes(la, s) for s in OPTIONS), 2 * la.num_weights] for la in case.layers])
        self.error = np.zeros(self.bytes.shape)
        for i, layer in enumerate(case.layers):
            weight = case.weight(layer.name)
            items = quantize_options(weight.bfloat16(), OPTIONS, split=layer.split, name=layer.name)
            self.decoded.append([*(item.dequantize() for item in items), weight.bfloat16()])
            self.error[i] = [relative_error(w_hat.float(), weight) for w_hat in self.decoded[i]]
        self.cpu_s = time.process_time() - start

    def best(self, budget: float) -> np.ndarray:
        """Return the options [L] of least summed error within a number of bytes: bisection of the price of a byte."""
        low, high, best = -40.0, 0.0, None
        for _ in range(60):
            middle = (low + high) / 2
            choice = (self.error + np.exp(middle) * self.bytes).argmin(axis=1)
            if np.take_along_axis(self.bytes, choice[:, None], 1).sum() <= budget:
                high, best = middle, choice
            else:
                low = middle
        if best is None:
            raise ValueError(f"no choice within {budget} bytes")
        return best


def calibrated(case: Case, choice: np.ndarray, moments: Mapping[str, Moments], kind: str) -> dict[str, torch.Tensor]:
    """Return the weights of a choice whose schemes are calibrated."""
    found = {}
    for layer, option in zip(case.layers, choice, strict=True):
        if LABELS[option] == "original":
            continue
        scheme = Scheme.parse(f"{OPTIONS[option].label}-{kind}")
        weight = case.weight(layer.name).bfloat16()
        item = quantize_weight(weight, scheme, split=layer.split, name=layer.name, moments=moments[layer.name])
        found[f"{layer.name}.weight"] = item.dequantize()
    return found


def compare_case(case: Case, records: dict[str, Any], folder: Path, name: str) -> list[dict[str, Any]]:
    """Return one row per peer: its bytes and SQNR, and quantdm's at no more bytes."""
    choices = Choices(case)
    moments = gather_moments(case.model, case.calibration, [layer.name for layer in case.layers])
    rows = []
    for peer, record in records.items():
        if "error" in record:
            rows.append({"peer": peer, "error": record["error"]})
            print(f"{name:<11}{peer:<21} cannot run here: {record['error'][:44]}")
            continue
        weights, _ = load_tensors(folder / f"{name}.{peer}.safetensors")
        choice = choices.best(record["bytes"] - case.rest_bytes)
        index = np.arange(len(choice))
        mine = {f"{la.name}.weight": choices.decoded[i][choice[i]] for i, la in enumerate(case.layers)}
        row = {
            "peer": peer,
            "bytes": record["bytes"],
            "sqnr_db": case.sqnr(weights),
            "quantized_layers": record["quantized_layers"],
            "cpu_s": round(record["cpu_s"], 2),
            "quantdm_bytes": int(choices.bytes[index, choice].sum()) + case.rest_bytes,
            "quantdm_sqnr_db": case.sqnr(mine),
            "quantdm_schemes": {LABELS[o]: int((choice == o).sum()) for o in np.unique(choice)},
        }
        for kind in CALIBRATIONS if peer in CALIBRATED_AT else ():
            row[f"quantdm_sqnr_db_{kind}"] = case.sqnr(calibrated(case, choice, moments, kind))
        rows.append(row)
        extra = "".join(f"{row[key]:>7.1f}" for kind in CALIBRATIONS if (key := f"quantdm_sqnr_db_{kind}") in row)
        line = f"{name:<11}{peer:<21}{row['bytes'] / 1e6:>7.2f}{row['sqnr_db']:>7.1f}"
        print(f"{line}{row['quantdm_bytes'] / 1e6:>9.2f}{row['quantdm_sqnr_db']:>7.1f}{extra}", flush=True)
    rows.append({"quantdm_all_options_cpu_s": round(choices.cpu_s, 1), "layers": len(case.layers)})
    return rows


def compare_models(peers: Path, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return the rows of every denoiser; quantdm's choice is the least weight error within the peer's bytes."""
    cases = {name: Case(name, folder) for name in names}
    script = str(Path(__file__).with_name("bench_peers.py"))
    subprocess.run([peers, script, "models", folder, *(folder / name for name in names)], check=True)
    records = read_json(folder / "records.json")
    print(f"\n{'denoiser':<11}{'peer':<21}{'MB':>7}{'dB':>7}{'our MB':>9}{'dB':>7}  importance, feedback")
    found: dict[str, Any] = {name: compare_case(case, records[name], folder, name) for name, case in cases.items()}
    return {
        **found,
        "settings": {"options": LABELS, "dit": DIT, "calibration_seeds": "0-7", "held_out_seeds": "100-107"},
    }
