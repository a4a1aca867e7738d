"""The bank: every layer quantized with every option, once; a configuration is swapped in by moving pointers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from quantdm.denoisers.layers import LayerRecord
from quantdm.errors import QuantDMError
from quantdm.files import digest, load_tensors, read_json, save_tensors, write_json
from quantdm.quantizers import QuantizedWeight, quantize_options, weight_error
from quantdm.schemes import Scheme

BANK_VERSION = 2
INDEX = "index.json"


class WeightBank:
    """All options of all layers of one denoiser, packed on disk, one safetensors file per layer.

    Files are addressed by the content of the weight and the options, so building again costs nothing and a changed
    weight is never confused with an old one.
    """

    def __init__(self, folder: str | Path, layers: Sequence[LayerRecord], options: Sequence[Scheme]) -> None:
        self.folder = Path(folder)
        self.layers = {layer.name: layer for layer in layers}
        self.options = tuple(options)
        self._files: dict[str, Path] = {}
        self._loaded: dict[str, dict[str, QuantizedWeight]] = {}
        self._errors: dict[str, dict[str, float]] = {}
        self._dense: dict[tuple[str, Scheme, torch.dtype], torch.Tensor] = {}

    def build(self, denoiser: nn.Module, *, progress: Callable[[], object] | None = None) -> "WeightBank":
        """Quantize what is not on disk yet, layer by layer; `progress` is called after every layer."""
        for name, layer in self.layers.items():
            weight = denoiser.get_parameter(f"{name}.weight").detach()
            path = self._path(name, weight)
            if not path.is_file():
                self._write(path, layer, weight)
            self._files[name] = path
            if progress is not None:
                progress()
        write_json(
            self.folder / INDEX, {"version": BANK_VERSION, "layers": {n: p.name for n, p in self._files.items()}}
        )
        return self

    @classmethod
    def open(cls, folder: str | Path, layers: Sequence[LayerRecord], options: Sequence[Scheme]) -> "WeightBank":
        """Open a bank that was built before, without the weights it was built from."""
        bank = cls(folder, layers, options)
        files = read_json(bank.folder / INDEX, version=BANK_VERSION)["layers"]
        bank._files = {name: bank.folder / files[name] for name in bank.layers}
        return bank

    def _path(self, name: str, weight: torch.Tensor) -> Path:
        labels = [scheme.label for scheme in self.options]
        return self.folder / f"{digest(BANK_VERSION, name, labels, self.layers[name].split, weight)}.safetensors"

    def _write(self, path: Path, layer: LayerRecord, weight: torch.Tensor) -> None:
        quantized = quantize_options(weight, self.options, split=layer.split, name=layer.name)
        tensors, errors = {}, {}
        for scheme, item in zip(self.options, quantized, strict=True):
            tensors |= {f"{scheme.label}/{key}": value for key, value in item.tensors.items()}
            errors[scheme.label] = weight_error(weight, item.dequantize(dtype=torch.float32))
        metadata = {
            "version": BANK_VERSION,
            "layer": layer.name,
            "shape": list(weight.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "split": layer.split,
            "errors": errors,
        }
        save_tensors(path, tensors, metadata)

    def _open(self, name: str) -> dict[str, QuantizedWeight]:
        if name not in self._loaded:
            if name not in self._files:
                raise QuantDMError(f"bank: no layer {name!r} in {self.folder}; build the bank first")
            tensors, meta = load_tensors(self._files[name])
            shape, dtype = tuple(meta["shape"]), getattr(torch, meta["dtype"])
            self._loaded[name] = {
                scheme.label: QuantizedWeight.from_tensors(
                    scheme,
                    shape,
                    meta["split"],
                    dtype,
                    {k.split("/", 1)[1]: v for k, v in tensors.items() if k.split("/", 1)[0] == scheme.label},
                )
                for scheme in self.options
            }
            self._errors[name] = meta["errors"]
        return self._loaded[name]

    def get(self, layer_name: str, scheme: Scheme) -> QuantizedWeight:
        """Return one layer under one scheme."""
        options = self._open(layer_name)
        if scheme.label not in options:
            raise QuantDMError(f"bank: {layer_name} has no option {scheme.label}; the bank holds {', '.join(options)}")
        return options[scheme.label]

    def weight_error(self, name: str, scheme: Scheme) -> float:
        """Return mean|w - ŵ|^2.4 / mean|w|^2.4 of one layer under one scheme."""
        self._open(name)
        return self._errors[name][scheme.label]

    def dense(self, name: str, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
        """Return the decoded weight, decoded once and kept."""
        key = (name, scheme, dtype)
        if key not in self._dense:
            self._dense[key] = self.get(name, scheme).dequantize(dtype=dtype)
        return self._dense[key]

    @contextmanager
    def applied(self, denoiser: nn.Module, config: Mapping[str, Scheme | None]) -> Iterator[nn.Module]:
        """Point the denoiser's weights at the bank's while the context is open; only pointers move."""
        originals: dict[str, torch.Tensor] = {}
        try:
            for name, scheme in config.items():
                if scheme is not None:
                    parameter = denoiser.get_parameter(f"{name}.weight")
                    originals[name] = parameter.data
                    parameter.data = self.dense(name, scheme, parameter.dtype).to(parameter.device)
            yield denoiser
        finally:
            for name, data in originals.items():
                denoiser.get_parameter(f"{name}.weight").data = data
